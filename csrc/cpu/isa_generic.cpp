// SPDX-License-Identifier: Apache-2.0
#define FUSAE_ISA generic
#include "cpu/kernels-inl.h"
