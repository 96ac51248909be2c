/**
 * The server's records, as docs/http.md describes them. Types alone; nothing runs here.
 *
 * @typedef {"onboarding"|"ready"|"unloaded"|"failed"} ModelState
 * @typedef {"alias"|"residual"|"own"} Rung
 *
 * @typedef {object} Price
 * @property {number} kl mean KL(variant || plan), nats per response token
 * @property {number} kl_upper upper end of its interval
 * @property {number} top1 share of tokens on which both agree, 0 to 1
 * @property {number} ppl_ratio
 * @property {number} tokens 0: nothing but equal bytes is shared
 *
 * @typedef {object} Plan
 * @property {string} policy
 * @property {Price|null} price
 * @property {"measured"|"claimed"|null} price_source
 * @property {number|null} budget_kl nats
 * @property {number|null} mean_cos
 * @property {number|null} mean_epsilon
 * @property {"aligned"|"boundary"|"outside"|null} region
 * @property {Record<string, number>} rung_bytes unique bytes by kind of rung
 * @property {number} bits_per_weight
 * @property {string} digest
 * @property {boolean} lossless
 *
 * @typedef {object} Model
 * @property {string} id
 * @property {ModelState} state
 * @property {string|null} family
 * @property {string|null} donor null of a donor
 * @property {DonorChoice|null} [donor_choice]
 * @property {{logical: number, unique: number, shared: number, saved: number, checkpoint: number}|null} bytes
 * @property {Record<Rung, number>|null} blocks number of blocks by rung
 * @property {Plan|null} plan
 * @property {ApiFault|null} error
 * @property {number} created_at seconds since the epoch
 * @property {number|null} last_used_at seconds since the epoch
 * @property {string|null} alias
 * @property {boolean} pinned
 * @property {number|null} keep_alive seconds; -1: for ever; null: as the settings say
 *
 * @typedef {{donor: string|null, reason: string}} DonorChoice why a model has its donor, or none
 *
 * @typedef {{code: string, message: string, param?: string|null}} ApiFault
 *
 * @typedef {object} Job
 * @property {string} id
 * @property {string} model
 * @property {"queued"|"running"|"succeeded"|"failed"|"cancelled"} status
 * @property {"validating"|"scanning"|"tuning"|"loading"} stage
 * @property {{done_bytes: number, total_bytes: number, bytes_per_second: number|null, remaining_seconds: number|null}} progress
 * @property {ApiFault|null} error
 * @property {number} created_at
 * @property {number|null} finished_at
 * @property {Record<string, unknown>|null} result
 *
 * @typedef {object} Status
 * @property {string} engine running, starting, stalled, down, ...
 * @property {boolean} ready
 * @property {string|null} reason
 * @property {{name: string, weights: number, kv: number, free: number, other: number, budget: number}|null} device bytes
 * @property {number|null} kv_usage_ratio 0 to 1
 * @property {number} running
 * @property {number} waiting
 * @property {{prompt_tokens: number, generation_tokens: number, requests: number, preemptions: number, prefix_queries: number, prefix_hits: number}} totals
 * @property {Record<string, {running: number, waiting: number, generation_tokens: number}>} models
 * @property {number} time the server's monotonic clock, seconds
 *
 * @typedef {{role: "admin"|"metrics"|"client"|"none", keys_required: boolean, version: string|null}} Session
 * @typedef {{generation: number, models: Map<string, number>}} Rates tokens per second
 *
 * @typedef {{index: number, cos: number|null, epsilon: number|null, rung: Rung, unique_bytes: number|null}} Block
 * @typedef {{unique_bytes: number, kl: number, kl_upper: number, chosen: boolean, rung_bytes: Record<string, number>}} PricedPlan
 * @typedef {{blocks: Block[]|null, frontier: PricedPlan[]|null}} Details
 *
 * @typedef {object} Study of a family's fine-tunes
 * @property {string} family
 * @property {"waiting"|"running"|"done"|"failed"} state
 * @property {string|null} reason why it waits
 * @property {ApiFault|null} error
 * @property {string|null} base
 * @property {string[]} variants that a study of now has
 * @property {Record<string, string>} same_weights by name, the variant it is a copy of
 * @property {Record<string, ApiFault>} left_out by name, why its checkpoint cannot be studied
 * @property {{done_tensors: number, total_tensors: number|null}|null} progress
 * @property {boolean} is_current whether the summary is of just these variants
 * @property {number|null} finished_at seconds since the epoch
 * @property {StudySummary|null} summary of the last that ended; null also until it is fetched
 *
 * @typedef {object} StudySummary numbers are means over tensors; null: too few fine-tunes for it
 * @property {string} base
 * @property {Record<string, StudiedVariant>} variants
 * @property {Record<string, StudiedComponent>} components q, k, v, o, gate, up, down, attention, mlp, all
 * @property {(number|null)[]} gap_per_layer
 * @property {{mean: number|null, matrix: number[][], null95: number[][], names: string[]}} pairwise_cosine
 * @property {{acceptance_ratio: number, weights_per_layer: (number|null)[]}|null} kernel
 * @property {{mean: number, null95: number|null}|null} shared_fraction of two fine-tunes
 * @property {StudyFinding[]} diagnostics
 * @property {number} num_tensors
 *
 * @typedef {object} StudiedVariant
 * @property {number} delta_norm
 * @property {number} epsilon
 * @property {number|null} loading_uncentred squared, 0 to 1
 * @property {number|null} jackknife_cosine
 * @property {number|null} jackknife_cosine_min
 * @property {"core"|"periphery"|null} role
 * @property {{kind: string, reason: string}[]} diagnostics
 *
 * @typedef {Record<string, any> & {num_tensors: number, snr: number|null}} StudiedComponent
 *   with `pc1`, `null95`, `interval` (two numbers), `majority_share` and `significant_share`, each
 *   plain and with the suffixes `_centred`, `_normalised` and `_normalised_centred`; or null
 *
 * @typedef {{kind: string, model: string, reason: string}} StudyFinding
 *
 * @typedef {object} SharePair a share and what it is held against
 * @property {string} name of a component
 * @property {number} share
 * @property {number} null95
 * @property {[number, number]|null} interval of the share, 95 %
 * @property {number|null} majority share of tensors whose PC1 is above a half
 * @property {number|null} significant share of tensors beyond their own null
 * @property {number} tensors
 */
export {};
