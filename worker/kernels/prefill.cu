// The prompt path's attention as a module.

#include "attention_prefill.cu"
