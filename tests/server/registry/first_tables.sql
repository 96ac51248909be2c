-- What a server from before the migrations made, with rows, as SQLite and PostgreSQL both read it.
CREATE TABLE models (
    name VARCHAR NOT NULL,
    source VARCHAR NOT NULL,
    request JSON NOT NULL,
    state VARCHAR(16) NOT NULL,
    position INTEGER NOT NULL,
    created_at DOUBLE PRECISION NOT NULL,
    donor VARCHAR,
    family VARCHAR,
    fingerprint VARCHAR,
    plan JSON,
    error JSON,
    last_used_at DOUBLE PRECISION,
    max_model_len INTEGER,
    PRIMARY KEY (name),
    FOREIGN KEY(donor) REFERENCES models (name)
);
CREATE INDEX ix_models_state ON models (state);
CREATE TABLE scans (
    donor_fingerprint VARCHAR NOT NULL,
    variant_fingerprint VARCHAR NOT NULL,
    report JSON NOT NULL,
    PRIMARY KEY (donor_fingerprint, variant_fingerprint)
);
CREATE TABLE tunings (
    donor_fingerprint VARCHAR NOT NULL,
    variant_fingerprint VARCHAR NOT NULL,
    "key" VARCHAR NOT NULL,
    saved_at DOUBLE PRECISION NOT NULL,
    result JSON NOT NULL,
    PRIMARY KEY (donor_fingerprint, variant_fingerprint, "key")
);
CREATE TABLE jobs (
    id VARCHAR NOT NULL,
    model VARCHAR NOT NULL,
    request JSON NOT NULL,
    status VARCHAR(16) NOT NULL,
    created_at DOUBLE PRECISION NOT NULL,
    stage VARCHAR(16) NOT NULL,
    done_bytes BIGINT NOT NULL,
    total_bytes BIGINT NOT NULL,
    error JSON,
    result JSON,
    finished_at DOUBLE PRECISION,
    PRIMARY KEY (id)
);
CREATE INDEX ix_jobs_model ON jobs (model);
INSERT INTO models VALUES (
    'acme/chat', '/models/chat', '{"name": "acme/chat", "tau_cos": 0.99}', 'ready', 1, 10.0, NULL,
    'acme/chat', 'ab', '{"policy": "donor"}', NULL, NULL, 128
);
INSERT INTO models VALUES (
    'near', '/models/chat', '{"name": "acme/chat", "tau_cos": 0.99}', 'ready', 2, 10.0,
    'acme/chat', 'acme/chat', 'ab', NULL, NULL, NULL, 128
);
INSERT INTO jobs VALUES (
    'job-1', 'acme/chat', '{}', 'running', 11.0, 'scanning', 5497558138880, 6597069766656, NULL,
    NULL, NULL
);
INSERT INTO scans VALUES ('d', 'v', '{"blocks": []}');
