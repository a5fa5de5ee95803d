//! What the machine has.

#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

use crate::kernels::isa::IsaName;

/// Whether every instruction that the kernels of `name` use is there.
pub(in crate::kernels) fn is_supported(name: IsaName) -> bool {
    match name {
        IsaName::Portable => true,
        #[cfg(target_arch = "x86_64")]
        IsaName::AmxInt8 => is_supported(IsaName::Avx512Vnni) && has_amx_int8(),
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

/// Whether the processor has AMX-TILE and AMX-INT8, and the system lets this process use them: its state is 8 KiB a thread,
/// which Linux saves for those only that have asked for it (`Documentation/arch/x86/xstate.rst`). Asking once is for all threads.
#[cfg(target_arch = "x86_64")]
fn has_amx_int8() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(|| {
        let leaf = std::arch::x86_64::__cpuid_count(7, 0).edx;
        let in_processor = leaf & (1 << 24) != 0 && leaf & (1 << 25) != 0;
        in_processor && ask_for_tiles()
    })
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn ask_for_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: a system call without pointers.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn ask_for_tiles() -> bool {
    false
}
