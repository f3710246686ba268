//! NF4 and MXFP4, byte by byte.

use anyhow::{Context, Result};
use bulkhead_tests::checkpoint::Tensors;
use bulkhead_tests::oracle;
use bulkhead_worker::quant::mxfp4::decode_group;
use bulkhead_worker::quant::{Matrix, Nf4, Scales, Statistics, quantize_nf4_with};
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::Value;

fn cases(folder: &str) -> Result<(Vec<Value>, Tensors)> {
    let index = oracle::json(&oracle::fixture(folder).join("vectors.json"))?;
    let cases = index["cases"].as_array().context("a list of cases")?.clone();
    assert!(!cases.is_empty());
    Ok((cases, Tensors::read(&oracle::fixture(folder).join("vectors.safetensors"))?))
}

fn bytes(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// Rounds to the element type that the oracle dequantised to.
fn encoded(values: &[f32], dtype: Dtype) -> Vec<u8> {
    if dtype == Dtype::BF16 {
        return values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect();
    }
    if dtype == Dtype::F16 {
        return values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect();
    }
    bytes(values.iter().copied())
}

fn decoded(nf4: &Nf4) -> Vec<f32> {
    Matrix::Nf4(nf4.clone()).decode_rows(0..nf4.rows())
}

#[test]
fn nf4_equals_bitsandbytes_byte_by_byte() -> Result<()> {
    let (cases, tensors) = cases("nf4")?;
    for case in cases {
        let name = case["name"].as_str().context("a name")?;
        let get = |part: &str| tensors.get(&format!("{name}.{part}"));
        let input = get("input")?;
        let [rows, cols] = input.shape[..] else { anyhow::bail!("{name} is no matrix") };
        let values = tensors.floats(&format!("{name}.input"))?;

        let plain = quantize_nf4_with(Statistics::Plain, rows, cols, &values)?;
        assert_eq!(plain.packed().bytes(), get("packed")?.bytes, "{name}: codes");
        assert_eq!(bytes((0..plain.blocks()).map(|block| plain.absmax(block))), get("absmax")?.bytes, "{name}: absmax");
        assert_eq!(encoded(&decoded(&plain), input.dtype), get("dequant")?.bytes, "{name}: dequant");
        assert_eq!(bytes(decoded(&plain)), get("dequant_f32")?.bytes, "{name}: dequant in f32");

        let nf4 = quantize_nf4_with(Statistics::Nested, rows, cols, &values)?;
        let Scales::Nested(nested) = nf4.scales() else { anyhow::bail!("nested was asked for") };
        assert_eq!(nf4.packed().bytes(), get("packed")?.bytes, "{name}: codes, nested");
        assert_eq!(bytes([nested.offset]), get("dq.offset")?.bytes, "{name}: offset");
        assert_eq!(bytes(nested.map.iter().copied()), get("dq.nested_code")?.bytes, "{name}: map");
        assert_eq!(bytes(nested.absmax.iter().copied()), get("dq.nested_absmax")?.bytes, "{name}: nested absmax");
        assert_eq!(nested.codes.bytes(), get("dq.absmax_u8")?.bytes, "{name}: absmax codes");
        let restored = bytes((0..nf4.blocks()).map(|block| nf4.absmax(block)));
        assert_eq!(restored, get("dq.absmax_restored")?.bytes, "{name}: restored absmax");
        assert_eq!(encoded(&decoded(&nf4), input.dtype), get("dq.dequant")?.bytes, "{name}: dequant, nested");
    }
    Ok(())
}

#[test]
fn mxfp4_equals_transformers_bit_by_bit() -> Result<()> {
    let (cases, tensors) = cases("mxfp4")?;
    for case in cases {
        let name = case["name"].as_str().context("a name")?;
        let (blocks, scales) = (tensors.get(&format!("{name}.blocks"))?, tensors.get(&format!("{name}.scales"))?);
        let groups = blocks.bytes.as_chunks::<16>().0;
        assert_eq!(groups.len(), scales.bytes.len(), "{name}");
        let found: Vec<f32> =
            groups.iter().zip(&scales.bytes).flat_map(|(group, scale)| decode_group(group, *scale)).collect();
        for (dtype, part) in [(Dtype::F32, "dequant_f32"), (Dtype::BF16, "dequant_bf16")] {
            assert!(encoded(&found, dtype) == tensors.get(&format!("{name}.{part}"))?.bytes, "{name}: {part}");
        }
    }
    Ok(())
}
