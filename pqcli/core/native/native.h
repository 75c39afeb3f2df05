/* What every C file here includes: which functions Python sees, and whole numbers as Python divides them. */
#pragma once
#include <stdint.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Registers of LANES float32: what the instruction level has. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

/* Registers of 512 bits are only used by functions that say so: compilers avoid them on x86-64-v4 of their own accord. */
#define WIDE __attribute__((min_vector_width(32 * LANES)))

static inline int64_t min_int(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t max_int(int64_t a, int64_t b) { return a > b ? a : b; }

/* a // b, rounded down, for b > 0. */
static inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
