// What experts do between their products.
#pragma once

namespace flashmla::sm90 {

__device__ __forceinline__ float Swiglu(float gate, float up) {
  return gate / (1 + __expf(-gate)) * up;
}

}  // namespace flashmla::sm90
