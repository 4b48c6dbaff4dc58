//! Structures of KVM as the bytes they are.

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

/// A structure of integers and unions of them.
///
/// # Safety
/// Every value of its bytes is a value of the type.
pub unsafe trait Integers: Sized {}

macro_rules! integers {
    ($($name:ty),*) => { $(
        // SAFETY: the interface between KVM and its users; integers, arrays and unions of them.
        unsafe impl Integers for $name {}
    )* };
}

integers!(
    kvm_clock_data,
    kvm_cpuid_entry2,
    kvm_debugregs,
    kvm_irqchip,
    kvm_lapic_state,
    kvm_mp_state,
    kvm_pit_state2,
    kvm_regs,
    kvm_sregs,
    kvm_vcpu_events,
    kvm_xcrs,
    kvm_xsave
);

/// One of them, as text.
#[derive(Clone, Copy)]
pub struct Plain<T>(pub T);

impl<T: Integers> Plain<T> {
    /// The bytes. Those between the fields are zero: no structure of KVM has any that are
    /// not named.
    fn bytes(&self) -> &[u8] {
        let start = (&raw const self.0).cast();
        // SAFETY: the value's memory, which is initialized (see the type), as long as it lives.
        unsafe { std::slice::from_raw_parts(start, size_of::<T>()) }
    }
}

impl<T: Integers> PartialEq for Plain<T> {
    fn eq(&self, other: &Self) -> bool {
        self.bytes() == other.bytes()
    }
}

impl<T> std::fmt::Debug for Plain<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(std::any::type_name::<T>())
    }
}

impl<T: Integers> Serialize for Plain<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(self.bytes()))
    }
}

impl<'de, T: Integers> Deserialize<'de> for Plain<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        let bytes = hex::decode(text.as_bytes()).map_err(D::Error::custom)?;
        if bytes.len() != size_of::<T>() {
            return Err(D::Error::custom(format!(
                "{} bytes, not the {} of {}",
                bytes.len(),
                size_of::<T>(),
                std::any::type_name::<T>()
            )));
        }
        // SAFETY: as many bytes as the type has, and any are a value of it.
        Ok(Plain(unsafe {
            bytes.as_ptr().cast::<T>().read_unaligned()
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_structure_is_its_bytes_and_no_others() {
        let regs = kvm_regs {
            rax: 0x0102,
            rflags: 2,
            ..kvm_regs::default()
        };
        let text = serde_json::to_string(&Plain(regs)).unwrap();
        assert!(text.starts_with("\"0201000000000000"), "{text}");
        let read: Plain<kvm_regs> = serde_json::from_str(&text).unwrap();
        assert_eq!(read.0, regs);
        for wrong in ["\"\"", "\"00\"", "\"zz\"", "7", "\"\u{e4}\""] {
            assert!(serde_json::from_str::<Plain<kvm_regs>>(wrong).is_err());
        }
        let long = format!("\"{}00\"", text.trim_matches('"'));
        assert!(serde_json::from_str::<Plain<kvm_regs>>(&long).is_err());
    }
}
