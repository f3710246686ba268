# Each target is the one command that the README names. They honour CARGO_TARGET_DIR, and need Rust, a C compiler and make;
# `test` also needs Python 3. What makes them faster or stricter (cargo-nextest, cargo-deny) is used when it is installed.

CARGO ?= cargo
PYTHON ?= python3
FUZZ_SECONDS ?= 120
MODEL ?= worker/demo-model/checkpoint

.PHONY: help run build-cuda gpu-pack test bench bench-peers lint fuzz storm cuda-check cuda-faults

help:
	@echo 'make run    build and serve the built-in model on http://127.0.0.1:8000 until Ctrl-C'
	@echo 'make test   run every test; a summary comes last'
	@echo 'make lint   check format, lints, licences and advisories'
	@echo 'make bench  measure MODEL (now $(MODEL)) beside what the memory of this machine allows'
	@echo 'make bench-peers  measure MODEL beside llama.cpp: GGUF=FILE LLAMA_BENCH=BIN, and what tools/bench_peers.py names'
	@echo 'make storm  kill workers all the time, in full length, and print what was measured'
	@echo 'make fuzz   run each fuzz target for FUZZ_SECONDS (now $(FUZZ_SECONDS))'
	@echo 'make cuda-check  compile the CUDA kernels for six architectures (fetches a compiler)'
	@echo 'make cuda-faults plant every fault in the CUDA kernels and see that the emulation notices'
	@echo 'make build-cuda  build everything in release mode, bulkhead-worker-cuda too (needs no card; fetches a compiler)'
	@echo 'make gpu-pack    that, and a folder to run tests/gpu/run.py from on a machine with a card and without Rust'

# The shell becomes the server, so that Ctrl-C and SIGTERM reach it. Not by `cargo run`, which would build the supervisor again
# with the features that it needs without the worker.
run:
	@$(CARGO) build --release --package bulkhead-supervisor --package bulkhead-worker --bins
	@exec "$${CARGO_TARGET_DIR:-target}/release/bulkhead" serve

# For machines with an NVIDIA card, made on any machine. Both builds name the same packages, so that what these depend on
# gets the same features and is built once.
build-cuda:
	@$(CARGO) build --release --package bulkhead-supervisor --package bulkhead-worker --bins
	@nvcc="$$($(PYTHON) tools/cuda_toolkit.py)" && BULKHEAD_NVCC="$$nvcc" \
	$(CARGO) build --release --package bulkhead-supervisor --package bulkhead-worker \
	--features bulkhead-worker/cuda --bin bulkhead-worker-cuda

gpu-pack: build-cuda
	@$(CARGO) build --release --workspace --bin synth-model
	@target="$${CARGO_TARGET_DIR:-target}" && $(PYTHON) tests/gpu/pack.py "$$target/release" "$$target/gpu-pack"

test:
	@$(PYTHON) tests/run.py

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	@if nvcc="$$($(PYTHON) tools/cuda_toolkit.py --no-fetch 2>/dev/null)"; then BULKHEAD_NVCC="$$nvcc" \
	$(CARGO) clippy --workspace --features bulkhead-worker/cuda --all-targets -- -D warnings; \
	else echo 'lint: no CUDA compiler is here: the code for cards was not checked'; fi
	@if $(CARGO) deny --version >/dev/null 2>&1; \
	then $(CARGO) deny --all-features check; \
	else echo 'lint: cargo-deny is not installed: licences and advisories were not checked'; fi

bench:
	@$(CARGO) build --release --package bulkhead-supervisor --package bulkhead-worker --bins
	@"$${CARGO_TARGET_DIR:-target}/release/bulkhead-worker" bench --model "$(MODEL)"

# An empty variable leaves its part out, or is refused by name.
bench-peers:
	@$(CARGO) build --release --package bulkhead-supervisor --package bulkhead-worker --bins
	@release="$${CARGO_TARGET_DIR:-target}/release" && $(PYTHON) tools/bench_peers.py --worker "$$release/bulkhead-worker" \
	--bulkhead "$$release/bulkhead" --model "$(MODEL)" --gguf "$(GGUF)" --llama-bench "$(LLAMA_BENCH)" \
	--llama-batched-bench "$(LLAMA_BATCHED_BENCH)" --llama-server "$(LLAMA_SERVER)" $(BENCH_PEERS)

fuzz:
	@$(CARGO) build --workspace --bins
	BULKHEAD_FUZZ_SECONDS=$(FUZZ_SECONDS) $(CARGO) test --package bulkhead-tests --test fuzz -- --nocapture

storm:
	@$(CARGO) build --workspace --bins
	BULKHEAD_STORM=full $(CARGO) test --package bulkhead-tests --test storm -- --nocapture --test-threads=1

cuda-check:
	@$(PYTHON) tests/cuda/check_compile.py

cuda-faults:
	BULKHEAD_CUDA_FAULTS=all $(CARGO) test --workspace --test cuda_emulation -- --nocapture
