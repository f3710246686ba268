// The decode path's attention in one module: rotation, cache write and attention share the cache's layout.

#include "rope.cu"

#include "attention_decode.cu"
