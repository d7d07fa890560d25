//! From packed codes and scales back to floats, on the CPU.
