#define FLEXLAM_VARIANT avx512
#define FLEXLAM_LANES 16
#include "frames_kernel.inl"
