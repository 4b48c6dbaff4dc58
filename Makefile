# The whole workflow; `make` alone prints the targets.
#
# Results: binaries in target/x86_64-unknown-linux-gnu/release, the guest's
# kernel and image in target/guest/FLAVOUR. Kernels are cached outside the
# checkout (see docs/guest-image.md), so that `make clean` does not cost one.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PREFIX ?= /usr/local
DESTDIR ?=
SYSCONFDIR ?= /etc

RELEASE := target/x86_64-unknown-linux-gnu/release
GUEST := target/guest
BIN := $(DESTDIR)$(PREFIX)/bin
LIB := $(DESTDIR)$(PREFIX)/lib/kuasar-runv
MAN := $(DESTDIR)$(PREFIX)/share/man

.PHONY: help
help: ## print this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | column -t -s '|'

.PHONY: setup
setup: ## install every distribution package the project needs (as root)
	@scripts/setup-packages run build kernel packaged test engines

# --- binaries ---

.PHONY: build
build: ## compile the host binary and the guest agent
	@scripts/setup-packages build
	@cargo build --release --workspace --bins
	@cargo build --profile agent --package kuasar-runv-agent

.PHONY: protocol
protocol: ## regenerate the code of the protocol from its .proto files
	@cargo run --manifest-path protocol/codegen/Cargo.toml

# --- guest ---

.PHONY: kernel
kernel: ## build the guest kernel from the distribution's source
	@scripts/setup-packages kernel
	@rootfs-builder/build-kernel source --out $(GUEST)/source

.PHONY: kernel-packaged
kernel-packaged: ## fetch the distribution's own kernel for the guest
	@scripts/setup-packages packaged
	@rootfs-builder/build-kernel packaged --out $(GUEST)/packaged

.PHONY: image
image: build kernel ## pack the image for the source kernel
	@scripts/guest-files source agent

.PHONY: image-packaged
image-packaged: build kernel-packaged ## pack the image for the packaged kernel
	@scripts/guest-files packaged agent

.PHONY: floor
floor: kernel ## pack the trivial init that the benchmarks compare with
	@rootfs-builder/build-image --floor --out $(GUEST)/floor.img

# --- use ---

# Compiling the kernel takes longer than all the rest: the demo uses it only
# when it is in the cache already.
.PHONY: demo
demo: ## set everything up and run a bundle in a VM
	@scripts/setup-packages run build packaged
	@scripts/demo

.PHONY: test
test: ## set everything up and run all tests
	@scripts/test

.PHONY: fuzz
fuzz: ## run every fuzz target for ten minutes
	@scripts/setup-packages build
	@scripts/fuzz

.PHONY: test-kvm
test-kvm: image ## run a selection of the tests on the built-in VMM, in a test machine with KVM
	@scripts/test-kvm

.PHONY: bench-kvm
bench-kvm: image ## measure boots with the built-in VMM beside QEMU on KVM, there as well
	@scripts/bench-kvm

# Continue with the other engines when one fails, and fail at the end.
.PHONY: integration
integration: image ## run all cases of podman, containerd, docker and buildah
	@status=0; for engine in podman containerd docker buildah; do \
	  integration/$$engine || status=1; done; exit $$status

.PHONY: bench
bench: image floor ## measure beside a bare boot, runc and crun
	@scripts/setup-packages run test
	@scripts/bench

.PHONY: lint
lint: ## formatting, clippy and, when installed, shellcheck
	@cargo fmt --all --check
	@cargo clippy --release --workspace --all-targets -- -D warnings
	@if command -v shellcheck >/dev/null; then \
	  shellcheck -x scripts/* rootfs-builder/build-* rootfs-builder/kernel/*.sh \
	    integration/podman integration/containerd integration/docker integration/buildah \
	    integration/oci-conformance integration/lib/*.sh integration/*.d/*.sh; \
	else echo 'lint: shellcheck is not installed, scripts were not checked'; fi

.PHONY: man
man: ## write the manual into target/man
	@scripts/setup-packages build
	@cargo build --release --workspace --bins
	@rm -rf target/man
	@$(RELEASE)/kuasar-runv man target/man

.PHONY: install
install: ## install into PREFIX (default /usr/local), below DESTDIR; needs make image
	@scripts/install-files "$(BIN)" "$(LIB)" "$(DESTDIR)$(SYSCONFDIR)" "$(MAN)" "$(PREFIX)"

.PHONY: clean
clean: ## remove what was built here; kernels stay in the cache
	@rm -rf target
