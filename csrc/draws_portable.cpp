#define FLEXLAM_VARIANT portable
#define FLEXLAM_LANES 4
#include "draws_kernel.inl"
