# make demo   eight peers train together on this machine
# make test   everything that is checked before a change lands
# make test-long  what takes minutes by itself: every command of the operator's handbook, and the rehearsal
# make check  the fast part of that: format, lint, types, imports
# make fuzz   feed the decoders of what strangers send with nonsense, until stopped or for FUZZ_SECONDS
# make soak   run the simulated network under drawn faults, until stopped or for SOAK_SECONDS; keep what fails
# make matrix what befalls members at every stage of a masked round: 1000 cases of four, 200 of eight
# make bench  the benchmarks
# make rehearsal  four banks go from nothing to a common model, in the commands of their operators

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Set PIP_EXTRA_INDEX_URL to PyTorch's CPU index to avoid its CUDA packages; pip reads it from the environment.
export PIP_EXTRA_INDEX_URL
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo rehearsal test test-long check fuzz soak matrix bench venv clean interop-packages
.DEFAULT_GOAL := demo

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@sh tools/system-packages.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --only-binary gmssl_pyx --editable '.[gm]' || \
	    echo "no wheel of gmssl-pyx for this machine: the suite gm is left out, and its tests are skipped"
	@touch $@

demo: venv
	$(BIN)/p2pfl demo $(ARGS)

rehearsal: venv
	$(BIN)/python examples/four-banks/rehearsal.py $(ARGS)

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/draw_layers.py --check

test: check interop-packages
	$(BIN)/python -m pytest -m "not slow and not long" -n 2 --dist worksteal
	$(BIN)/python -m pytest -m "slow and not long"

test-long: venv
	$(BIN)/python -m pytest -m long

# js-libp2p, for the tests against another implementation; without it they are skipped, saying so.
interop-packages:
	@if command -v npm >/dev/null 2>&1; then \
	    cd tests/interop && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error || true; \
	fi

fuzz: venv
	$(BIN)/python tests/fuzz.py --seconds $(or $(FUZZ_SECONDS),0)

soak: venv
	$(BIN)/python -m p2pfl.simulation.soak --seconds $(or $(SOAK_SECONDS),0)

matrix: venv
	$(BIN)/python -m p2pfl.simulation.matrix --members 4 --seeds $(or $(MATRIX_SEEDS),1000)
	$(BIN)/python -m p2pfl.simulation.matrix --members 8 --seeds $(or $(MATRIX_SEEDS),200)

bench: venv
	$(BIN)/python benchmarks/round.py
	$(BIN)/python benchmarks/channel.py
	$(BIN)/python benchmarks/masks.py
	$(BIN)/python benchmarks/dense.py
	$(BIN)/python benchmarks/moshpit.py
	$(BIN)/python benchmarks/secure_round.py

clean:
	rm -rf $(VENV)
