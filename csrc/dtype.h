#pragma once

namespace rellax {

enum class Dtype { float32, bfloat16, float16 };

}  // namespace rellax
