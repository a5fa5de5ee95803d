//! What the machine has.

use crate::kernels::isa::IsaName;

/// Whether every instruction that the kernels of `name` use is there.
pub(in crate::kernels) fn is_supported(name: IsaName) -> bool {
    match name {
        IsaName::Portable => true,
        #[cfg(target_arch = "x86_64")]
        IsaName::Avx512Vnni => {
            is_supported(IsaName::Avx2)
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
        }
        #[cfg(target_arch = "x86_64")]
        IsaName::AvxVnni => is_supported(IsaName::Avx2) && is_x86_feature_detected!("avxvnni"),
        #[cfg(target_arch = "x86_64")]
        IsaName::Avx2 => {
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
        }
        #[cfg(target_arch = "aarch64")]
        IsaName::NeonDotprod => {
            std::arch::is_aarch64_feature_detected!("neon") && std::arch::is_aarch64_feature_detected!("dotprod")
        }
        _ => false,
    }
}

/// Whether AVX512-FP16 is there.
pub(in crate::kernels) fn has_avx512_fp16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512fp16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}
