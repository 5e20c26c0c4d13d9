#define FLEXLAM_VARIANT portable
#define FLEXLAM_LANES 4
#include "frames_kernel.inl"
