// The vector type of the instruction set that this translation unit is compiled for, in a namespace of its own.
//
// Sources that include this are compiled once for each instruction set. They keep to plain C++ inside FIAK_ISA: no
// inline function or template of a library, which the linker could hand to code for lesser machines.
#pragma once

#if defined(FIAK_ISA_AVX512)
#define FIAK_ISA avx512
#elif defined(FIAK_ISA_AVX2)
#define FIAK_ISA avx2
#else
#error "compile this file with FIAK_ISA_AVX2 or FIAK_ISA_AVX512"
#endif
