# Sourced by the other scripts: makes sure of a C linker and of Rust, and on request of a Vulkan
# driver; says what to do where it cannot install them.

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

# Whether the system has a Vulkan loader and a driver for it, of whatever GPU.
has_vulkan() {
    PATH="$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null | grep 'libvulkan\.so\.1' >/dev/null || return 1
    [ -z "${VK_DRIVER_FILES:-${VK_ICD_FILENAMES:-}}" ] || return 0
    compgen -G '/usr/share/vulkan/icd.d/*.json' >/dev/null ||
        compgen -G '/usr/local/share/vulkan/icd.d/*.json' >/dev/null ||
        compgen -G '/etc/vulkan/icd.d/*.json' >/dev/null
}

# For what runs on a GPU: Mesa's software Vulkan, where there is no driver (macOS and Windows bring
# their own).
need_vulkan() {
    [ "$(uname -s)" = Linux ] || return 0
    ! has_vulkan || return 0
    echo "setup: no Vulkan driver found, installing Mesa's software one" >&2
    install_packages mesa-vulkan-drivers libvulkan1 || {
        echo "setup: install a Vulkan driver: Debian, Ubuntu: mesa-vulkan-drivers libvulkan1; Fedora: mesa-vulkan-drivers" \
            "vulkan-loader; Arch: vulkan-swrast vulkan-icd-loader (NF4PACK_REQUIRE_GPU=0 continues without GPU tests)" >&2
        exit 1
    }
}

need_linker
need_rust
