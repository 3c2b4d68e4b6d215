// How loops over host memory are vectorised: plain ones over whole blocks, compiled once per instruction set
// by DEAR_CLONES and chosen when the module is loaded. It compiles to the plain loop where that is not
// supported.
#pragma once

// Sanitizers run their own start-up code after the loader has resolved the clones: they get the plain loop.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define DEAR_HAS_CLONES 1
#define DEAR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DEAR_CLONES
#endif

// Lets the sums named run in separate lanes, which the rules of float addition otherwise forbid.
#define DEAR_PRAGMA(text) _Pragma(#text)
#ifdef _OPENMP
#define DEAR_SIMD_SUM(...) DEAR_PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#else
#define DEAR_SIMD_SUM(...)
#endif
