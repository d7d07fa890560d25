#!/bin/sh
# The compiler of the crates of this workspace (RUSTC_WORKSPACE_WRAPPER of scripts/fuzz.sh), with
# what cargo-fuzz passes: coverage of edges and comparisons. The dependencies are compiled without
# it, so a build of the tests has them already. The comparisons of the targets themselves, such as
# those of a reference with each element, are not traced: they took most of the time.
case " $* " in
    *" nf4pack_fuzz"*) compares= ;;
    *) compares=-Cllvm-args=-sanitizer-coverage-trace-compares ;;
esac
exec "$@" --cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    $compares
