// Which instruction-set tiers this processor and operating system can run.
#pragma once

namespace vk {

enum Isa { PORTABLE, AVX2, AVX512, ISA_COUNT };
extern const char* const isa_names[ISA_COUNT];

bool isa_supported(Isa isa);  // built in, and safe to run here

}  // namespace vk
