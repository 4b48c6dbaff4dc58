// @generated

pub mod agent;
pub mod network;
pub mod storage;
