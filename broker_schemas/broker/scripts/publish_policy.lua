-- Makes a policy version current; versions only grow.
-- KEYS[3]  policy  hash  version, optimizer_step, weights_path, processor_fingerprint, published_at_ms
-- ARGV[2]  policy version
-- ARGV[3]  optimizer step after which it was published
-- ARGV[4]  where its weights are
-- ARGV[5]  fingerprint of the image processor it is trained with, or ""
-- Reply: 1 published, 0 it (or a later one) is current already.
go_on_at_the_limit()
local current = tonumber(redis.call('HGET', KEYS[3], 'version') or '-1')
if tonumber(ARGV[2]) <= current then return 0 end
redis.call('HSET', KEYS[3], 'version', ARGV[2], 'optimizer_step', ARGV[3], 'weights_path', ARGV[4],
  'processor_fingerprint', ARGV[5], 'published_at_ms', now_ms())
emit('policy_published', 'policy_version', ARGV[2], 'optimizer_step', ARGV[3], 'weights_path', ARGV[4])
count('policies_published', 1)
return 1
