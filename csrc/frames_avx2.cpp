#define FLEXLAM_VARIANT avx2
#define FLEXLAM_LANES 8
#include "frames_kernel.inl"
