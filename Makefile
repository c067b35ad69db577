# Each target installs what it needs and prints what it installs; running it again is quick.
PYTHON ?= /usr/bin/python3
VENV   := .venv
BIN    := $(VENV)/bin

APT_PIP   := python3-pip-whl
APT_BUILD := gcc libc6-dev musl-tools iproute2 netbase nftables libbpf1 procps
APT_DEV   := clang libbpf-dev
APT_TEST  := libclang-rt-dev curl iptables docker.io busybox-static debootstrap systemd man-db
APT_SHELLS := fish zsh
APT_BENCH := socat haproxy postgresql postgresql-contrib
APT_VM    := qemu-system-x86 cpio kmod xz-utils
APT_NEED  := $(PYTHON) scripts/apt_need.py

PIP := $(BIN)/python3 -m pip install --quiet --disable-pip-version-check --no-compile --progress-bar off
# Puts pip into the environment; ensurepip would need six seconds more, for setuptools and for what is compiled on use, too.
UNPACK := import sys, sysconfig, zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sysconfig.get_path("purelib"))

.DELETE_ON_ERROR:
.PHONY: build parts need-pip need-compilers need-dev dev wheel deb test test-wheel test-deb test-install test-engines test-vm lint \
    docs bench bench-docker demo demo-docker format clean

.DEFAULT_GOAL := build
include compile.mk
BPF := build/ebpf/redirect.bpf.o build/ebpf/steering.bpf.o

# The Python packages and the compiled parts: at the same time, as installing takes longest.
build:
	@$(MAKE) --no-print-directory --jobs=2 parts

parts: $(BIN)/gangway $(BIN)/gangway-docker-proxy $(CORE)/core.so

need-pip:
	@$(APT_NEED) $(APT_PIP)

need-compilers: | need-pip
	@$(APT_NEED) $(APT_BUILD)

$(BIN)/gangway: pyproject.toml | need-pip
	@echo "make: installing gangway and the Python packages that it needs into $(VENV)"
	@$(PYTHON) -m venv --without-pip $(VENV)
	@$(BIN)/python3 -c '$(UNPACK)' /usr/share/python-wheels/pip-*.whl
	@$(PIP) --editable .
	@touch $@

$(COMPILED): | need-compilers

# The launcher starts the python3 beside it.
$(BIN)/gangway-docker-proxy: $(LAUNCHER) | $(BIN)/gangway
	@cp $< $@

# What only developers need.
dev: build $(BIN)/pytest $(BPF)

need-dev: | build
	@$(APT_NEED) $(APT_DEV)

$(BIN)/pytest: pyproject.toml | build
	@echo "make: installing the developers' Python packages into $(VENV)"
	@$(PIP) --editable '.[dev,bench]'
	@touch $@

# The compiled eBPF programs are in git, so that only those who change them need clang.  They are compiled here again, and
# copied if they differ; `make lint` fails until the copy is in git, too.
build/ebpf/%.bpf.o: src/gangway/ebpf/%.bpf.c src/gangway/ebpf/published.bpf.h | need-dev
	@mkdir -p $(@D)
	clang -O2 -g -Wall -Wextra -Werror -target bpf -fdebug-compilation-dir=. -I/usr/include/$(shell gcc -print-multiarch) \
	    -c $< -o $@
	@cmp -s $@ $(<:.c=.o) || cp $@ $(<:.c=.o)

# Tests start a thousand Python programs, which would all compile the modules again.
unexport PYTHONDONTWRITEBYTECODE

# Tests wait more than they compute: three at once keep two cores busy. The quickest files come last, so that none is
# waited for alone.
# The root of Debian 13's dockerd is built in the background, the first time only; tests that need it wait for it.
test: dev
	@$(APT_NEED) $(APT_TEST)
	@$(BIN)/python3 -m lab.engines trixie & \
	$(BIN)/python3 -m pytest -n 3 --dist loadfile --no-loadscope-reorder tests/kernel tests/docker tests/unit

WHEEL = $(lastword $(sort $(wildcard build/dist/gangway-$(VERSION)-py3-none-*.whl)))
# A wheel in build/dist, for this machine's architecture.
wheel: dev
	$(BIN)/python3 -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/dist .

test-wheel: dev
	@$(APT_NEED) debootstrap
	$(BIN)/python3 -m pytest -s -o timeout=900 tests/install/test_wheel_install.py

# Debian packages for Debian 12 and 13 in build/dist; they carry the Python packages that a release has not new enough.
deb: wheel
	for suite in bookworm trixie; do $(BIN)/python3 scripts/build_deb.py $$suite $(WHEEL) || exit 1; done

test-deb: deb
	@$(APT_NEED) debootstrap lintian
	$(BIN)/python3 -m pytest -s -o timeout=900 tests/install/test_deb_install.py tests/install/test_deb_upgrade.py

# Needs the network: new minimal systems, in which gangway is installed as users do; completion in other shells than bash.
test-install: deb
	@$(APT_NEED) debootstrap lintian $(APT_SHELLS)
	$(BIN)/python3 -m pytest -s -o timeout=900 tests/install

# The newest dockerd that Debian has, which changes from day to day: not in CI.
test-engines: dev
	@$(APT_NEED) $(APT_TEST)
	DOCKER_ENGINE=sid $(BIN)/python3 -m pytest tests/docker

# Debian's kernel under qemu, which is slow: only tests whose outcome depends on the kernel. tests/unit/conftest.py lists
# the unit tests among them; tests with the same outcome on every kernel are marked any_kernel.
IN_VM := tests/vm/run $(abspath $(BIN))/python3 -m pytest -p no:cacheprovider -o timeout=600 -v -m 'not any_kernel'
test-vm: dev
	@$(APT_NEED) $(APT_TEST) $(APT_VM)
	GANGWAY_VM_LIMIT=2400 $(IN_VM) -n 2 --dist loadfile tests/unit tests/kernel
	GANGWAY_VM_OPTIONS=ipv6.disable=1 $(IN_VM) tests/kernel/test_ipv6_disabled.py

lint: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	for one in $(CORE)/*.c; do gcc -std=gnu11 -O1 -fanalyzer -Wall -Wextra -Werror -c -o /dev/null $$one || exit 1; done
	git diff --exit-code --stat -- '*.bpf.o' || { echo "lint: these were compiled again: add them to the commit"; exit 1; }

format: dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The documentation as a site in build/site. Only installing mkdocs needs the network; warnings are errors.
docs: $(BIN)/mkdocs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python3 -m mkdocs --quiet build --strict

$(BIN)/mkdocs: pyproject.toml | build
	@echo "make: installing mkdocs into $(VENV)"
	@$(PIP) --editable '.[docs]'
	@touch $@

# All rows but those of bench-docker, or some: make bench ROWS=rr64,crr16
COMMA := ,
SPACE := $(subst ,, )
bench: dev
	@$(APT_NEED) $(APT_TEST) $(APT_BENCH)
	$(BIN)/python3 -m bench $(if $(ROWS),--only $(subst $(COMMA),$(SPACE),$(ROWS)))
	$(BIN)/python3 -m manual.chart

# Docker's ports without dockerd's rules and proxies, with the dockerd of Debian 13.
bench-docker: dev
	@$(APT_NEED) $(APT_TEST) $(APT_BENCH)
	$(BIN)/python3 -m bench --docker --engine trixie --rounds 2

demo: build
	@$(BIN)/python3 -m demo

demo-docker: build
	@$(APT_NEED) $(APT_TEST)
	@$(BIN)/python3 -m demo.docker

clean:
	rm -rf $(VENV) build $(CORE)/core.so $(CORE)/flow_table.h
