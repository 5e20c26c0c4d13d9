#define FLEXLAM_VARIANT avx512
#define FLEXLAM_LANES 16
#include "fsq_kernel.inl"
