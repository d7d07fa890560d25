# Sourced by the other scripts: makes sure of a C linker and of Rust, and says what to do where it cannot install them.

# Runs apt-get where there is one, as root or through sudo.
install_packages() {
    command -v apt-get >/dev/null || return 1
    local as_root=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || return 1
        as_root=(sudo)
    fi
    "${as_root[@]}" apt-get update -qq >&2
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

need_linker() {
    command -v cc >/dev/null && return
    echo "setup: no C linker found, installing gcc" >&2
    install_packages gcc libc6-dev || { echo "setup: install a C linker (on Debian: apt-get install gcc libc6-dev)" >&2; exit 1; }
}

need_rust() {
    [ -f "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
    if ! command -v cargo >/dev/null; then
        echo "setup: no Rust found, trying the rustup package" >&2
        if ! { install_packages rustup && rustup default stable; }; then
            echo "setup: install Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) or newer: https://rustup.rs" >&2
            exit 1
        fi
    fi
}

need_linker
need_rust
