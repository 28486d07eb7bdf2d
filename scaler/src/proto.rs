//! KEDA's external scaler interface, generated from `proto/externalscaler.proto`.

#![expect(
    missing_docs,
    clippy::pedantic,
    clippy::allow_attributes,
    reason = "generated code"
)]

tonic::include_proto!("externalscaler");
