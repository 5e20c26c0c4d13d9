#define FLEXLAM_VARIANT avx512
#define FLEXLAM_LANES 16
#include "sequence_kernel.inl"
