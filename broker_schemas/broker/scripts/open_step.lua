-- Opens an optimizer step for which rollouts are wanted (on-policy variants); a later step replaces it.
-- KEYS[3]  open_step  hash  optimizer_step, policy_version, num_rollouts, carried (matched segments that were
--                           there before it), sealed (1 when its packs are complete), packed_segments and
--                           packed_packs (what left in packs before that)
-- KEYS[4]  matched    stream  as in commit_match
-- ARGV[2]  optimizer step
-- ARGV[3]  policy version
-- ARGV[4]  rollouts wanted
-- Reply: 1 opened, 0 it was open or passed already.
go_on_at_the_limit()
local open = tonumber(redis.call('HGET', KEYS[3], 'optimizer_step') or '-1')
if tonumber(ARGV[2]) <= open then return 0 end
redis.call('HSET', KEYS[3], 'optimizer_step', ARGV[2], 'policy_version', ARGV[3], 'num_rollouts', ARGV[4],
  'carried', redis.call('XLEN', KEYS[4]), 'sealed', 0, 'packed_segments', 0, 'packed_packs', 0)
emit('step_opened', 'optimizer_step', ARGV[2], 'policy_version', ARGV[3], 'num_rollouts', ARGV[4])
return 1
