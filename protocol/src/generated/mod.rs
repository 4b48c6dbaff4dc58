// @generated

pub mod agent;
pub mod network;
pub mod resources;
pub mod storage;
