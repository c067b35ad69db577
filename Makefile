# Each target installs what it needs and prints what it installs; running it again is quick.
PYTHON ?= /usr/bin/python3
VENV   := .venv
BIN    := $(VENV)/bin
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

APT_BUILD := python3-venv gcc libc6-dev musl-tools clang libbpf-dev
APT_DEMO  := iproute2 nftables libbpf1
APT_TEST  := $(APT_DEMO) libclang-rt-dev curl iptables docker.io busybox-static debootstrap
APT_BENCH := $(APT_TEST) socat haproxy postgresql postgresql-contrib
APT_VM    := qemu-system-x86 cpio kmod xz-utils

.DELETE_ON_ERROR:
.PHONY: build test test-engines test-vm lint bench bench-docker demo demo-docker format clean

# The compiled eBPF programs; nothing is compiled when gangway runs.
BPF := src/gangway/ebpf/redirect.bpf.o src/gangway/ebpf/steering.bpf.o

# The relay's data plane, and the table of states that it is compiled with.
CORE := src/gangway/relay/core

build: $(BIN)/gangway $(BIN)/gangway-docker-proxy $(BPF) $(CORE)/core.so

$(BIN)/gangway: pyproject.toml
	@scripts/apt-need $(APT_BUILD)
	@echo "make: installing gangway and its Python tools into $(VENV)"
	@test -x $(BIN)/python3 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python3 -m pip install --quiet --disable-pip-version-check --editable '.[dev,bench]'
	@touch $@

$(BIN)/gangway-docker-proxy: $(wildcard launcher/*.c) launcher/launcher.h | $(BIN)/gangway
	musl-gcc -std=gnu11 -static -Os -Wall -Wextra -Werror -DVERSION=\"$(VERSION)\" -o $@ $(filter %.c,$^)

$(BPF): %.o: %.c src/gangway/ebpf/published.bpf.h | $(BIN)/gangway
	clang -O2 -g -Wall -Wextra -Werror -target bpf -I/usr/include/$(shell gcc -print-multiarch) -c $< -o $@

$(CORE)/flow_table.h: $(CORE)/table.py src/gangway/relay/flow.py | $(BIN)/gangway
	$(BIN)/python3 -m gangway.relay.core.table > $@

$(CORE)/core.so: $(wildcard $(CORE)/*.c) $(CORE)/core.h $(CORE)/parts.h $(CORE)/flow_table.h
	gcc -std=gnu11 -O2 -g -flto=auto -fPIC -shared -fvisibility=hidden -fstack-protector-strong -D_FORTIFY_SOURCE=2 \
	    -Wl,-z,relro,-z,now -Wall -Wextra -Werror -o $@ $(filter %.c,$^)

# Tests start a thousand Python programs, which would all compile the modules again.
unexport PYTHONDONTWRITEBYTECODE

# Tests wait more than they compute: three at once keep two cores busy. The quickest files come last, so that none is
# waited for alone.
# The root of Debian 13's dockerd is built in the background, the first time only; tests that need it wait for it.
test: build
	@scripts/apt-need $(APT_TEST)
	@$(BIN)/python3 -m lab.engines trixie & \
	$(BIN)/python3 -m pytest -n 3 --dist loadfile --no-loadscope-reorder tests/kernel tests/docker tests/unit

# The newest dockerd that Debian has, which changes from day to day: not in CI.
test-engines: build
	@scripts/apt-need $(APT_TEST)
	DOCKER_ENGINE=sid $(BIN)/python3 -m pytest tests/docker

# Debian's kernel under qemu, which is slow: only tests whose outcome depends on the kernel. tests/unit/conftest.py lists
# the unit tests among them; tests with the same outcome on every kernel are marked any_kernel.
IN_VM := tests/vm/run $(abspath $(BIN))/python3 -m pytest -p no:cacheprovider -o timeout=600 -v -m 'not any_kernel'
test-vm: build
	@scripts/apt-need $(APT_TEST) $(APT_VM)
	GANGWAY_VM_LIMIT=2400 $(IN_VM) -n 2 --dist loadfile tests/unit tests/kernel
	GANGWAY_VM_OPTIONS=ipv6.disable=1 $(IN_VM) tests/kernel/test_ipv6_disabled.py

lint: build
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	for one in $(CORE)/*.c; do gcc -std=gnu11 -O1 -fanalyzer -Wall -Wextra -Werror -c -o /dev/null $$one || exit 1; done

format: build
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# All rows but those of bench-docker, or some: make bench ROWS=rr64,crr16
COMMA := ,
SPACE := $(subst ,, )
bench: build
	@scripts/apt-need $(APT_BENCH)
	$(BIN)/python3 -m bench $(if $(ROWS),--only $(subst $(COMMA),$(SPACE),$(ROWS)))

# Docker's ports without dockerd's rules and proxies, with the dockerd of Debian 13.
bench-docker: build
	@scripts/apt-need $(APT_BENCH)
	$(BIN)/python3 -m bench --docker --engine trixie --rounds 2

demo: build
	@scripts/apt-need $(APT_DEMO)
	@$(BIN)/python3 -m demo

demo-docker: build
	@scripts/apt-need $(APT_TEST)
	@$(BIN)/python3 -m demo.docker

clean:
	rm -rf $(VENV) build $(BPF) $(CORE)/core.so $(CORE)/flow_table.h
