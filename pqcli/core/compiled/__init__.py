"""How loops become machine code: numba kernels kept on disk, LLVM IR written by hand."""
