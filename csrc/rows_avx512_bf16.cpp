#define FLEXLAM_VARIANT avx512_bf16
#define FLEXLAM_LANES 16
#include "rows_kernel.inl"
