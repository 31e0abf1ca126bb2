//! Enums whose values are stored and shown as words.

/// A stored word that names no value: the store was written by another version, or by hand.
#[derive(Debug, thiserror::Error)]
#[error("unknown {what} `{word}`")]
pub struct UnknownWord {
    /// Which kind of word was expected.
    pub what: &'static str,
    /// The word that was read in its place.
    pub word: String,
}

/// Implements `ALL`, `as_str`, `Display` and `FromStr` for an enum by the word of each value.
macro_rules! words {
    ($type:ty, $what:literal, $($variant:ident = $word:literal),+ $(,)?) => {
        #[allow(unreachable_pub, dead_code, reason = "some of these enums are public, and not each one is listed")]
        impl $type {
            /// Every value, in the order of declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The stored and shown word.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }
        impl ::std::fmt::Display for $type {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
        impl ::std::str::FromStr for $type {
            type Err = $crate::model::words::UnknownWord;
            fn from_str(word: &str) -> Result<Self, Self::Err> {
                match word {
                    $($word => Ok(Self::$variant),)+
                    _ => Err($crate::model::words::UnknownWord { what: $what, word: word.to_owned() }),
                }
            }
        }
    };
}
pub(crate) use words;
