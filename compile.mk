# What is compiled of gangway: rules of the Makefile, and of the wheel's build (scripts/build_hook.py). They install nothing.
# (The eBPF programs are compiled already: docs/decisions/0006-compiled-ebpf-in-git.md.)
CORE     := src/gangway/relay/core
LAUNCHER := build/gangway-docker-proxy
COMPILED := $(CORE)/core.so $(LAUNCHER)
VERSION  := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/gangway/__init__.py)

.PHONY: compiled man
compiled: $(COMPILED)

# The manual pages, made from the texts of the help and the example of the settings.
man:
	rm -rf build/man
	$(PYTHON) scripts/build_man.py build/man

$(LAUNCHER): $(wildcard launcher/*.c) launcher/launcher.h src/gangway/__init__.py compile.mk
	@mkdir -p $(@D)
	musl-gcc -std=gnu11 -static -Os -Wall -Wextra -Werror -DVERSION=\"$(VERSION)\" -o $@ $(filter %.c,$^)

# The table of states that the relay's data plane is compiled with.
$(CORE)/flow_table.h: $(CORE)/table.py src/gangway/relay/flow.py
	PYTHONPATH=src $(PYTHON) -m gangway.relay.core.table > $@

$(CORE)/core.so: $(wildcard $(CORE)/*.c) $(CORE)/core.h $(CORE)/parts.h $(CORE)/flow_table.h
	gcc -std=gnu11 -O2 -g -ffile-prefix-map=$(CURDIR)=. -flto=auto -fPIC -shared -fvisibility=hidden \
	    -fstack-protector-strong -D_FORTIFY_SOURCE=2 -Wl,-z,relro,-z,now -Wall -Wextra -Werror -o $@ $(filter %.c,$^)
