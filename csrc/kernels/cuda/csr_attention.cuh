// All device code of csr_attention, and how its kernels are launched.
#pragma once

#include "kernels/cuda/csr_entries.cuh"
#include "kernels/cuda/csr_launches.h"
#include "kernels/cuda/csr_tiles.cuh"
