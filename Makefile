# Two commands set everything up on a fresh machine: `make merge-qlora` and `make test`.
# Both create .venv and install into it when pyproject.toml has changed since the last install.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# the demo's inputs; give BASE, ADAPTER and OUT (and the rest as needed) to run on your own model
DEMO   := examples/demo
OUT    ?= out/demo
FORMAT ?= gptq
TOKENS ?=
SAMPLES ?=
ARGS   ?=
# test processes side by side; each loads torch and the libraries (about 1.5 GB)
JOBS ?= 2
RESULTS ?= $(OUT).eval/results.json
BASELINE ?= eval/baselines/demo.json

ifdef BASE
  INPUTS = --base "$(BASE)" --adapter "$(ADAPTER)" $(if $(CALIBRATION),--calibration "$(CALIBRATION)") $(if $(GENERIC),--generic "$(GENERIC)") $(if $(EVAL),--text "$(EVAL)") $(if $(TEMPLATE),--template "$(TEMPLATE)")
  SIZES  = $(if $(TOKENS),--tokens $(TOKENS)) $(if $(SAMPLES),--samples $(SAMPLES)) $(if $(BUDGET),--budget "$(BUDGET)") $(if $(OVERWRITE),--overwrite)
else
  INPUTS = --base $(DEMO)/base-nf4 --adapter $(DEMO)/adapter --calibration $(DEMO)/calibration.jsonl --generic $(DEMO)/generic.jsonl --text prose=$(DEMO)/eval-prose.jsonl --text code=$(DEMO)/eval-code.jsonl
  SIZES  = --tokens $(or $(TOKENS),256) $(if $(SAMPLES),--samples $(SAMPLES)) --budget $(or $(BUDGET),default) --also rtn $(if $(or $(OVERWRITE),$(filter out/demo,$(OUT))),--overwrite)
endif

.DEFAULT_GOAL := help
.PHONY: help setup merge-qlora test test-slow fuzz check wheel oldest eval serving report gate baseline card notebook notebook-page bench bench-eval bench-quality bench-peers bench-merge bench-stats demo clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1|\2/' | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'
	@echo
	@echo "  make merge-qlora BASE=… ADAPTER=… OUT=… CALIBRATION=… [EVAL=… FORMAT=gptq|nf4|bf16|fp16 GENERIC=… TOKENS=… SAMPLES=… BUDGET=… OVERWRITE=1 ARGS='…']"

setup: $(STAMP) ## create .venv and install qmerge with all extras

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing qmerge, torch, bitsandbytes, gptqmodel, lm-eval, … into $(VENV): about 6 GB, a few minutes"
	$(BIN)/python -m pip install --quiet --editable ".[gptq,compressed,eval,notebook,sign,dev]"
	@touch $@

merge-qlora: $(STAMP) ## merge, requantize, measure and report: the demo, or BASE=… ADAPTER=… OUT=…
	@$(BIN)/qmerge run $(INPUTS) --format $(FORMAT) --out "$(OUT)" $(SIZES) $(ARGS)

test: $(STAMP) ## the test suite (minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -rs

# alone: what measures time or rates, beside which nothing else may run
test-slow: $(STAMP) ## the longer checks
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not alone" -n $(JOBS) --dist worksteal -rs
	@$(BIN)/python -m pytest -m "slow and alone" -rs

check: $(STAMP) ## ruff, and mypy's strict rules on the package
	@$(BIN)/ruff check qmerge tests scripts
	@$(BIN)/mypy qmerge

wheel: $(STAMP) ## build dist/, and try the wheel in a new environment without extras (minutes, 2 to 7 GB below /tmp); ARGS='torch==…'
	@$(BIN)/python scripts/check_wheel.py --out dist $(ARGS)

oldest: $(STAMP) ## tests on the oldest versions that pyproject.toml admits, in an environment below .bench (minutes, 7 GB)
	@$(BIN)/python scripts/check_oldest.py $(ARGS)

eval: $(STAMP) ## measure OUT again: BASE=… ADAPTER=… OUT=… EVAL=… (default: the demo)
	@$(BIN)/qmerge eval $(if $(BASE),--base "$(BASE)" --adapter "$(ADAPTER)" --text "$(EVAL)",--base $(DEMO)/base-nf4 --adapter $(DEMO)/adapter --text prose=$(DEMO)/eval-prose.jsonl --text code=$(DEMO)/eval-code.jsonl) --candidate "$(OUT)" --out "$(RESULTS)" $(ARGS)

serving: $(STAMP) ## time OUT against base + adapter, memory and tokens/s, into RESULTS: BASE=… ADAPTER=… OUT=… (default: the demo)
	@$(BIN)/qmerge bench $(if $(BASE),--base "$(BASE)" --adapter "$(ADAPTER)",--base $(DEMO)/base-nf4 --adapter $(DEMO)/adapter) --candidate "$(OUT)" --into "$(RESULTS)" $(ARGS)

report: $(STAMP) ## write report.md and report.html from RESULTS
	@$(BIN)/qmerge report "$(RESULTS)" --out "$(dir $(RESULTS))"

gate: $(STAMP) ## hold RESULTS (default: the demo's) against the accepted eval/baselines/demo.json, or BASELINE=…
	@$(BIN)/qmerge compare "$(RESULTS)" --baseline "$(BASELINE)" --ignore-versions --budget "$(or $(BUDGET),default)" --junit "$(dir $(RESULTS))junit.xml" $(ARGS)

baseline: $(STAMP) ## accept RESULTS (default: the demo's, after make merge-qlora) as eval/baselines/demo.json, or BASELINE=…
	@$(BIN)/qmerge compare "$(RESULTS)" --budget "$(or $(BUDGET),default)" --save-baseline "$(BASELINE)"

card: $(STAMP) ## give OUT its model card: OUT=… [BASE=… ADAPTER=… ARGS='--base-id … --adapter-id …']
	@$(BIN)/qmerge card "$(OUT)" $(if $(BASE),--base "$(BASE)" --adapter "$(ADAPTER)") $(ARGS)

notebook: $(STAMP) ## run both notebooks: that of RESULTS, rendered to HTML beside them, and that of the Python API (a minute)
	@$(BIN)/python scripts/render_notebook.py "$(RESULTS)" "$(dir $(RESULTS))separate_vs_merged.html"
	@$(BIN)/python scripts/run_notebook.py --check

notebook-page: $(STAMP) ## docs/separate_vs_merged.html, the same for the demo (after make merge-qlora)
	@$(BIN)/python scripts/render_notebook.py "$(RESULTS)" docs/separate_vs_merged.html

READERS ?=
RUNS ?= 5000
fuzz: $(STAMP) ## give each reader of foreign files RUNS hostile inputs (READERS='header index …'); guided by coverage where atheris can be installed
	@$(BIN)/python -c "import atheris" 2>/dev/null || $(BIN)/python -m pip install --quiet --editable ".[fuzz]" || true
	@$(BIN)/python tests/fuzz/campaign.py $(READERS) --runs $(RUNS) --jobs $(JOBS)

SPEED ?= .bench/speed.json
bench: $(STAMP) ## each part's time against a peer or a floor in the same minutes, into SPEED (ten minutes); OLD=… names what got slower than in that file
	@$(BIN)/python scripts/bench_speed.py --out "$(SPEED)" $(ARGS)
	$(if $(OLD),@$(BIN)/python scripts/compare_speed.py "$(OLD)" "$(SPEED)")

bench-eval: $(STAMP) ## time of an evaluation against two plain forward passes, on vocabularies of 4k to 128k (minutes)
	@$(BIN)/python scripts/bench_eval.py $(ARGS)

bench-quality: $(STAMP) ## quality against round-to-nearest, PEFT, gptqmodel and what bench-peers installed (uses ../shared where it is there; under an hour)
	@$(BIN)/python scripts/bench_quality.py $(ARGS)

# their pins contradict gptqmodel's; what both can use comes from $(VENV), so that torch is not installed three times
bench-peers: $(STAMP) ## llm-compressor and auto-round for bench-quality, each in an environment of its own below .bench (some GB)
	@set -e; for peer in llmcompressor=llmcompressor==0.14.0.1 autoround=auto-round==0.16.1; do \
	  env=.bench/env-$${peer%%=*}; $(PYTHON) -m venv $$env; \
	  site='import sysconfig; print(sysconfig.get_paths()["purelib"])'; \
	  $(BIN)/python -c "$$site" > "$$($$env/bin/python -c "$$site")/zz_qmerge_venv.pth"; \
	  $$env/bin/python -m pip install --quiet "$${peer#*=}"; done

bench-merge: $(STAMP) ## speed and memory of the float merge against a copy and PEFT, on the shapes of an 8B model (minutes, some 20 GB of disk)
	@$(BIN)/python scripts/bench_merge.py

bench-stats: $(STAMP) ## coverage of the intervals, power and false alarms of the gate, by simulation (minutes)
	@$(BIN)/python scripts/bench_stats.py $(ARGS)

demo: $(STAMP) ## train the demo model again (about 15 minutes)
	@$(BIN)/python scripts/make_demo.py

clean: ## remove .venv, out/ and caches
	rm -rf $(VENV) out .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
