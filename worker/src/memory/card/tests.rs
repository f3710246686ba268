use bulkhead_shared::message::{DeviceChoice, Faults};

use super::*;

const GIB: u64 = 1 << 30;

/// The dimensions of gpt-oss-20b, and of the 120b, whose figures are published.
fn config(name: &str) -> Config {
    let text = match name {
        "20b" => include_bytes!("../../../../tests/fixtures/configs/gpt-oss-20b.json").as_slice(),
        "120b" => include_bytes!("../../../../tests/fixtures/configs/gpt-oss-120b.json"),
        other => panic!("no fixture for {other}"),
    };
    Config::parse(text, name).expect("the fixture is whole")
}

fn asked(context_tokens: u32, sequences_max: u32) -> LoadPlan {
    LoadPlan {
        model_dir: "/models/20b".into(),
        device: DeviceChoice::Cuda(0),
        may_use_processor: false,
        context_tokens,
        sequences_max,
        kv_bytes: Bytes(0),
        device_budget: Bytes(0),
        kv_type: KvType::Bf16,
        faults: Faults::default(),
    }
}

/// Plans the 20b in NF4 on a budget in tenths of GiB, beside 64 GiB of host memory.
fn nf4(context_tokens: u32, sequences: u32, budget_tenths: u64) -> Result<CardPlan, PlanError> {
    let config = config("20b");
    let sizes = sizes_of(&config, Some(Quantization::Nf4));
    let limits = CardLimits { budget: Bytes(budget_tenths * GIB / 10), host_available: Bytes(64 * GIB) };
    plan_card(&config, &sizes, &asked(context_tokens, sequences), KvType::Bf16, limits)
}

/// Checks what must be true of every plan.
fn check_sums(plan: &CardPlan, sizes: &WeightSizes, limits: CardLimits) {
    assert!(plan.card_bytes() <= limits.budget, "{plan:?} passes {limits:?}");
    assert!(
        plan.weights_host.0 + plan.kv_host.0 + plan.swap.0 <= limits.host_available.0,
        "{plan:?} passes {limits:?}"
    );
    let layers: u64 = sizes.layers.iter().map(|layer| layer.attention + layer.mlp).sum();
    assert_eq!(plan.weights_card.0 + plan.weights_host.0, layers + sizes.embedding + sizes.lm_head);
    let moved = plan.host_layers.iter().zip(&sizes.layers).filter(|(is_host, _)| **is_host);
    let embedding = if plan.is_embedding_on_card { 0 } else { sizes.embedding };
    let whole = sizes.layers.iter().rev().take(plan.whole_layers).map(|layer| layer.attention);
    assert_eq!(plan.weights_host.0, moved.map(|(_, layer)| layer.mlp).chain(whole).sum::<u64>() + embedding);
    assert!(u64::from(plan.full_blocks) * u64::from(BLOCK_TOKENS) >= u64::from(plan.context_tokens));
}

#[test]
fn sizes_of_the_20b_are_the_published_ones() {
    let config = config("20b");
    let experts = |form| sizes_of(&config, form).layers.iter().map(|layer| layer.mlp).sum::<u64>();
    for (form, gb) in [(Some(Quantization::Nf4), 9.86), (Some(Quantization::Mxfp4), 10.15), (None, 38.2)] {
        // The published figures leave out the biases: 24 * 32 * 8640 of them.
        let weights = (experts(form) - 24 * 32 * 8640 * 4) as f64 / 1e9;
        assert!((weights - gb).abs() < 0.05, "{form:?}: {weights} GB");
    }
    let sizes = sizes_of(&config, Some(Quantization::Mxfp4));
    assert_eq!((sizes.embedding, sizes.lm_head), (2 * 201_088 * 2880, 2 * 201_088 * 2880 + 4 * 2880));
    assert!(!sizes.is_tied);
}

#[test]
fn blocks_are_those_of_the_kernels() {
    let shape = KvShape::of(&config("20b"));
    // 8 heads; 32 tokens of 64 elements, keys and values; in 8 bits with a scale for each.
    assert_eq!(layer_block_bytes(&shape, KvType::Bf16), 8 * 2 * 32 * 64 * 2);
    assert_eq!(layer_block_bytes(&shape, KvType::Int8), 8 * 2 * 32 * (64 + 4));
    assert_eq!(12 * layer_block_bytes(&shape, KvType::Bf16), shape.full_block_bytes());
}

#[test]
fn buffers_are_counted_row_by_row() {
    let config = config("20b");
    let bytes = |generated, prompt| scratch_bytes_card(&config, generated, prompt, 8192);
    let row = 2880 * (2 + 4 + 4 + 2 + 4 + 4) + 5120 * 4 + 4096 * 2 + 32 * 4 + 4 * 12 + 4 * 2880 * (2 + 4);
    assert_eq!(bytes(8, 512) - bytes(8, 256), 256 * row);
    // The roles share the rows, but only generated tokens have parts of attention, logits and a choice.
    let output = 64 * 64 * 66 * 4 + 8 * 4 + 4 + 2880 * 2 + 201_088 * 4 + 197 * 24 + 8;
    assert!((bytes(72, 512) - bytes(8, 512)).abs_diff(64 * output) < 7 * 256, "but for the alignment");
}

/// Finds the largest budget, in tenths of GiB, at which something is given up, and the plan for it.
fn first(sequences: u32, is_it: impl Fn(&GivenUp) -> bool) -> CardPlan {
    let plans = (60..500).rev().filter_map(|tenths| nf4(0, sequences, tenths).ok());
    plans.into_iter().find(|plan| plan.given_up.iter().any(&is_it)).expect("it is given up at some size")
}

#[test]
fn each_rung_gives_up_one_thing_more() {
    let words = |plan: &CardPlan| plan.given_up.iter().map(GivenUp::to_string).collect::<Vec<_>>();
    // Everything, the embedding included.
    let plan = nf4(0, 8, 500).expect("fits");
    assert_eq!((words(&plan), plan.swap), (vec![], Bytes(0)));
    assert!(plan.is_embedding_on_card);
    assert_eq!(plan.full_blocks, 8 * 4096);
    // Less than a whole pool: the embedding, and room to make room.
    let plan = nf4(0, 8, 220).expect("fits");
    assert_eq!(words(&plan), ["the embedding on the host"]);
    assert_eq!((plan.context_tokens, plan.step_tokens, plan.sequences), (131_072, 8192, 8));
    assert!((4096..8 * 4096).contains(&plan.full_blocks), "{}", plan.full_blocks);
    assert!(plan.swap.0 > 0);
    // Smaller steps keep the context.
    let plan = first(8, |given_up| matches!(given_up, GivenUp::StepTokens { .. }));
    assert_eq!(words(&plan), ["the embedding on the host", "prompt steps of 4096 tokens instead of 8192"]);
    // Fewer of many sequences do too.
    let plan = first(64, |given_up| matches!(given_up, GivenUp::Sequences { .. }));
    assert_eq!((plan.context_tokens, plan.given_up.len()), (131_072, 3), "{:?}", plan.given_up);
    assert!((8..64).contains(&plan.sequences), "{:?}", plan.given_up);
    // An open context shrinks.
    let plan = first(8, |given_up| matches!(given_up, GivenUp::Context { .. }));
    assert_eq!(plan.context_given_up, Some(131_072));
    assert!((32_768..131_072).contains(&plan.context_tokens), "{}", plan.context_tokens);
    assert_eq!(plan.context_tokens % CONTEXT_STEP, 0);
    assert_eq!((plan.step_tokens, plan.host_layers.contains(&true)), (8192, false));
    // Experts go, the last layers first, as few as needed.
    let plan = first(8, |given_up| matches!(given_up, GivenUp::MlpsOnHost { .. }));
    let last_alone: Vec<bool> = (0..24).map(|layer| layer == 23).collect();
    assert_eq!(plan.host_layers, last_alone);
    assert!(plan.context_tokens >= 8192);
    let bytes = Bytes(sizes_of(&config("20b"), Some(Quantization::Nf4)).layers[0].mlp);
    assert_eq!(plan.given_up.last(), Some(&GivenUp::MlpsOnHost { what: "experts", layers: 1, of: 24, bytes }));
}

/// The multiple that a chosen context has.
const CONTEXT_STEP: u32 = 1024;

#[test]
fn a_context_that_was_asked_for_moves_experts_instead() {
    for budget in [72, 100, 108, 120, 130] {
        let plan = nf4(131_072, 8, budget).expect("experts move");
        assert_eq!((plan.context_tokens, plan.context_given_up), (131_072, None), "{budget}");
        assert!(plan.host_layers.contains(&true), "{budget}");
    }
    assert!(!nf4(131_072, 8, 147).expect("fits").host_layers.contains(&true));
}

#[test]
fn whole_layers_move_where_keys_and_values_alone_are_too_large() {
    // Keys and values of 131072 tokens take 256 MiB in each layer that sees them all.
    let plan = nf4(131_072, 8, 30).expect("layers move");
    assert_eq!((plan.context_tokens, plan.sequences, plan.swap), (131_072, 8, Bytes(0)));
    assert!(plan.whole_layers > 0 && plan.host_layers.iter().all(|is_host| *is_host), "{plan:?}");
    let more = nf4(131_072, 8, 33).expect("fewer layers move");
    assert!((1..plan.whole_layers).contains(&more.whole_layers), "{}", more.whole_layers);
    let moved = |plan: &CardPlan| (24 - plan.whole_layers..24).filter(|layer| layer % 2 == 1).count() as u64;
    assert!(plan.kv_host.0 >= moved(&plan) * (256 << 20), "{plan:?}");
    let layers = u32::try_from(plan.whole_layers).expect("few");
    assert_eq!(plan.given_up.last(), Some(&GivenUp::LayersOnHost { layers, of: 24 }));
    assert_eq!(nf4(8192, 8, 30).expect("fits").whole_layers, 0);
}

#[test]
fn what_does_not_fit_says_what_would() {
    // The layer that stays longest sees the whole context.
    let mut config = config("20b");
    config.layers.reverse();
    let sizes = sizes_of(&config, Some(Quantization::Nf4));
    let plan = |context, budget| {
        let limits = CardLimits { budget: Bytes(budget), host_available: Bytes(64 * GIB) };
        plan_card(&config, &sizes, &asked(context, 8), KvType::Bf16, limits)
    };
    let budget = 19 * GIB / 10;
    let error = plan(131_072, budget).expect_err("its keys and values alone take 256 MiB");
    let PlanError::CardTooSmall { context: 131_072, fits, needed, .. } = error else { panic!("{error}") };
    assert!(error.to_string().contains(&format!("set context_tokens to at most {fits}")), "{error}");
    let fitting = plan(fits, budget).expect("what the error says fits");
    assert_eq!(fitting.context_tokens, fits);
    assert!(plan(131_072, needed.0 - 1).is_err() && plan(131_072, needed.0).is_ok(), "{needed}");

    let error = plan(0, GIB).expect_err("no room for anything");
    assert!(matches!(error, PlanError::CardTooSmall { fits: 0, .. }), "{error}");
    assert!(error.to_string().ends_with("give the device more memory, or compute on the processor"), "{error}");
}

#[test]
fn the_host_must_hold_what_the_card_does_not() {
    let config = config("120b");
    let sizes = sizes_of(&config, Some(Quantization::Mxfp4));
    let plan = |host: u64| {
        let limits = CardLimits { budget: Bytes(22 * GIB), host_available: Bytes(host) };
        plan_card(&config, &sizes, &asked(0, 8), KvType::Bf16, limits)
    };
    let PlanError::HostTooSmall { needed, .. } = plan(32 * GIB).expect_err("most of 57 GiB stays") else { panic!() };
    assert!(plan(needed.0 - 1).is_err());
    let at = plan(needed.0).expect("the error said so");
    assert_eq!((at.weights_host, at.swap), (needed, Bytes(0)));
}

#[test]
fn bounds_of_the_context_are_the_models() {
    assert!(nf4(131_072, 1, 220).is_ok());
    let error = nf4(131_073, 1, 220).expect_err("beyond the model");
    assert_eq!(error, PlanError::ContextBeyondModel { asked: 131_073, model: 131_072 });
}

#[test]
fn a_tied_head_stays_where_it_is() {
    let config = Config { has_tied_embeddings: true, ..config("20b") };
    let sizes = sizes_of(&config, Some(Quantization::Nf4));
    assert_eq!((sizes.embedding, sizes.is_tied), (0, true));
    let limits = CardLimits { budget: Bytes(8 * GIB), host_available: Bytes(16 * GIB) };
    let plan = plan_card(&config, &sizes, &asked(0, 8), KvType::Bf16, limits).expect("fits");
    assert!(plan.is_embedding_on_card && !plan.given_up.contains(&GivenUp::EmbeddingOnHost));
    check_sums(&plan, &sizes, limits);
}

#[test]
fn a_cache_of_a_given_size_is_not_passed() {
    let config = config("20b");
    let sizes = sizes_of(&config, Some(Quantization::Nf4));
    let limits = CardLimits { budget: Bytes(22 * GIB), host_available: Bytes(64 * GIB) };
    let plan = |context, kv_bytes| {
        let asked = LoadPlan { kv_bytes: Bytes(kv_bytes), ..asked(context, 8) };
        plan_card(&config, &sizes, &asked, KvType::Bf16, limits)
    };
    let kv = GIB + 12_345;
    let open = plan(0, kv).expect("a smaller context fits");
    assert!(open.kv.0 <= kv && open.context_given_up == Some(131_072), "{open:?}");
    let PlanError::ContextTooLarge { fits, .. } = plan(131_072, kv).expect_err("3 GiB") else { panic!() };
    assert_eq!(plan(fits, kv).expect("what the error says fits").context_tokens, fits);
}

#[test]
fn eight_bits_hold_nearly_twice_the_tokens() {
    let config = config("20b");
    let sizes = sizes_of(&config, Some(Quantization::Nf4));
    let limits = CardLimits { budget: Bytes(22 * GIB), host_available: Bytes(64 * GIB) };
    let blocks = |kv_type| plan_card(&config, &sizes, &asked(0, 8), kv_type, limits).expect("fits").full_blocks;
    let ratio = f64::from(blocks(KvType::Int8)) / f64::from(blocks(KvType::Bf16));
    // The windows, which are not counted here, shrink too, and leave some room for more.
    assert!((1.88..1.93).contains(&ratio), "68 bytes instead of 128 for a head: {ratio}");
}

#[test]
fn no_plan_passes_its_limits() {
    for (name, form) in [("20b", Some(Quantization::Nf4)), ("20b", None), ("120b", Some(Quantization::Mxfp4))] {
        let config = config(name);
        let sizes = sizes_of(&config, form);
        for tenths in (5..900).step_by(13) {
            for context in [0, 100, 8192, 50_000, 131_072] {
                for (sequences, kv_type) in [(1, KvType::Bf16), (8, KvType::Int8), (64, KvType::Bf16)] {
                    let limits = CardLimits { budget: Bytes(tenths * GIB / 10), host_available: Bytes(40 * GIB) };
                    match plan_card(&config, &sizes, &asked(context, sequences), kv_type, limits) {
                        Ok(plan) => {
                            check_sums(&plan, &sizes, limits);
                            assert!(context == 0 || plan.context_tokens == context, "{plan:?}");
                        }
                        Err(PlanError::CardTooSmall { needed, budget, .. }) => assert!(needed > budget),
                        Err(PlanError::HostTooSmall { needed, available, .. }) => assert!(needed > available),
                        Err(other) => panic!("{other}"),
                    }
                }
            }
        }
    }
}
