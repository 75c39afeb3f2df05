"""How loops become machine code.

jit    loops that numba compiles once, kept on disk and loaded without numba
ir     functions written as LLVM IR, compiled when first needed
"""
