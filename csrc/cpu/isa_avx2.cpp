// SPDX-License-Identifier: Apache-2.0
#define FUSAE_ISA avx2
#include "cpu/kernels-inl.h"
