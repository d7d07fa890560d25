//! What the commands share that run a model.

use super::ui::Ui;
use crate::arch::config::ModelConfig;
use crate::convert::notice::Notice;
use crate::dequant::stream::PackSource;
use crate::model::error::ModelError;

/// Reads the config.json of a pack, and says which of its keys have no effect.
pub fn read(pack: &PackSource, ui: Ui) -> Result<ModelConfig, ModelError> {
    let model = ModelConfig::of_pack(pack)?;
    model.check_runnable()?;
    if !model.ignored_keys.is_empty() {
        ui.warning(&Notice::IgnoredKeys { keys: model.ignored_keys.clone() }.to_string());
    }
    Ok(model)
}
