// @generated

pub mod agent;
pub mod network;
