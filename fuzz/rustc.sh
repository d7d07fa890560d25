#!/bin/sh
# The compiler of the crates of this workspace (RUSTC_WORKSPACE_WRAPPER of scripts/fuzz.sh), with
# what cargo-fuzz passes: coverage of edges and comparisons. The dependencies are compiled without
# it, so a build of the tests has them already.
exec "$@" --cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares
