# SPDX-License-Identifier: Apache-2.0
"""Runs the PTX that nvcc makes of the CUDA kernels, without a GPU.

The emulator (csrc/cuda/emulate.h) runs the kernels' C++ with a CPU's version of warp.h. Here it is
the other half of warp.h that runs, the inline PTX, with what nvcc made of everything around it:

    parse         PTX text to instructions
    arithmetic    what each computes, as NumPy functions
    collectives   tensor core products and transposes
    memory        allocations, shared memory and its race detector, asynchronous copies
    lower         an instruction to a function on registers
    machine       threads: which run next, where they wait for each other
    device        nvcc, and launches of the emulated library that run here

What it does not know it refuses by name, so a new instruction is a failing test and never a guess.
It shows neither speed nor what ptxas makes of the PTX.
"""
