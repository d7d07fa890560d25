#!/usr/bin/env bash
# Builds the tests of the encoder and the decoder for Arm and runs them: nothing else runs the NEON
# backends on another processor.
#   scripts/neon.sh          prepares and runs
#   scripts/neon.sh prepare  installs an Arm linker, qemu, and Rust's standard library for Arm
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

arm=aarch64-unknown-linux-gnu
debian=$PWD/target/debian-rust

# Rust's standard library for Arm, from rustup or, where rustup has none, from Debian together with
# the compiler that it was built by.
has_standard_library() { [ -d "$(rustc --print sysroot)/lib/rustlib/$arm/lib" ]; }

# apt-get on Debian's stable packages alone, for both processors, in a folder of its own: it knows
# of no installed package.
apt_stable() {
    local command=$1
    shift
    "$command" -o Dir::State="$debian/apt" -o Dir::State::status=/dev/null -o Dir::Cache="$debian/apt/cache" \
        -o Dir::Etc::sourcelist="$debian/apt/sources.list" -o Dir::Etc::sourceparts=- -o APT::Sandbox::User=root \
        -o APT::Architectures=amd64,arm64 -o APT::Architecture=amd64 -o Debug::NoLocking=1 "$@"
}

fetch_debian_rust() {
    [ ! -x "$debian/rustc" ] || return 0
    command -v apt-get >/dev/null && [ "$(uname -m)" = x86_64 ] || return 1
    local keys=/usr/share/keyrings/debian-archive-keyring.gpg root=$debian/root archives=$debian/apt/cache/archives mirror
    # Debian's packages come from where the system's own come from.
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | sed -n 1p)
    [ -n "$mirror" ] || return 1
    rm -rf "$debian"
    mkdir -p "$root" "$debian/apt/lists/partial" "$archives/partial"
    echo "deb [signed-by=$keys] $mirror stable main" >"$debian/apt/sources.list"
    apt_stable apt-get update -qq
    # What the compiler's library needs comes with it, libc too; the compiler itself would bring a
    # linker.
    apt_stable apt-get install -qq -y --download-only --no-install-recommends libstd-rust-web-dev
    (cd "$archives" && apt_stable apt-get download -qq rustc-web libstd-rust-web-dev:arm64)
    local package
    for package in "$archives"/*.deb; do
        dpkg-deb -x "$package" "$root"
    done
    rm -r "$debian/apt"
    # With its own libc, which the system's may be older than.
    local libraries=$root/usr/lib/x86_64-linux-gnu
    cat >"$debian/rustc.new" <<EOF
#!/bin/sh
exec "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$root/usr/bin/rustc" --sysroot "$root/usr" "\$@"
EOF
    chmod +x "$debian/rustc.new"
    "$debian/rustc.new" --version
    mv "$debian/rustc.new" "$debian/rustc"
}

prepare() {
    if ! command -v qemu-aarch64 >/dev/null || ! command -v aarch64-linux-gnu-gcc >/dev/null || [ ! -d /usr/aarch64-linux-gnu/lib ]; then
        install_packages qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross || {
            echo "neon: install qemu's user mode and a C compiler for Arm (Debian: qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross)" >&2
            exit 1
        }
    fi
    if ! has_standard_library && ! timeout 60 rustup target add "$arm" && ! fetch_debian_rust; then
        echo "neon: no standard library for Arm (rustup target add $arm)" >&2
        exit 1
    fi
}

if [ "$(uname -m)" = aarch64 ]; then
    echo "SKIPPED: this is an Arm processor, the ordinary tests run the NEON backends"
    exit 0
fi
prepare
[ "${1:-}" != prepare ] || exit 0
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"
has_standard_library || export RUSTC=$debian/rustc
cargo test --locked --manifest-path tests/neon/Cargo.toml --target-dir target/neon --target "$arm" --lib
