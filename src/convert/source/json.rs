//! JSON objects read key by key, so that a repeated key is seen; `serde_json` alone would silently
//! keep the last.

use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use super::limits::MAX_TENSORS;

/// The entries of one object in the order of the file, and the first key that came twice. An object
/// of more than [`MAX_TENSORS`] keys is an error: short keys take many times their length in
/// memory.
pub(super) struct Object<T> {
    pub(super) entries: Vec<(String, T)>,
    pub(super) repeated: Option<String>,
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ObjectVisitor(PhantomData))
    }
}

struct ObjectVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
    type Value = Object<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut object = Object { entries: Vec::new(), repeated: None };
        let mut seen = HashSet::new();
        while let Some((key, value)) = map.next_entry::<String, T>()? {
            if !seen.insert(key.clone()) {
                object.repeated.get_or_insert_with(|| key.clone());
            }
            if object.entries.len() == MAX_TENSORS {
                return Err(A::Error::custom(format_args!("more than {MAX_TENSORS} keys")));
            }
            object.entries.push((key, value));
        }
        Ok(object)
    }
}
