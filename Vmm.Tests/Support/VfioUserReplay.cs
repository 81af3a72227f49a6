using System.Collections.Concurrent;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Tests.Support;

/// <summary>
/// A scripted server that replays a captured conversation. During attach it searches the capture for the answer to each question, because
/// each client asks in its own order. Then it goes step by step: the client's next message must equal the recorded one, and the server sends
/// the recorded reply. It does not compare message ids, version JSON, the identity of descriptors, and fields that <see cref="Normalise"/> clears.
/// </summary>
internal sealed class VfioUserReplay : IDisposable
{
    private readonly List<CapturedMessage> _capture;
    private readonly BlockingCollection<(CapturedStep Step, TaskCompletionSource Done)> _steps = [];
    private readonly GuestMemory _dmaMemory;
    private readonly OwnedFd _region;
    private readonly HashSet<ulong> _written = [];
    private readonly List<VfioFeatureOp> _migrationAsked = [];

    internal VfioUserReplay(string name, GuestMemory dmaMemory)
    {
        _capture = VfioUserCapture.Read(name);
        _dmaMemory = dmaMemory;
        _region = Posix.MemFd("region");
        Posix.Truncate(_region, 1 << 20);
        Server = new ScriptedVfioUserServer(Run).Start();
    }

    internal ScriptedVfioUserServer Server { get; }

    internal IEnumerable<CapturedStep> Steps => VfioUserCapture.Steps(_capture);

    /// <summary>The operations on MIGRATION that the client asked for during attach.</summary>
    internal IReadOnlyList<VfioFeatureOp> MigrationAsked => _migrationAsked;

    /// <summary>The operations on MIGRATION that a client must ask for during attach: none of a server before DEVICE_FEATURE, PROBE only after a refused GET.</summary>
    internal VfioFeatureOp[] MigrationExpected => Minor == 0 ? [] : HasMigration ? [VfioFeatureOp.Get] : [VfioFeatureOp.Get, VfioFeatureOp.Probe];

    private ushort Minor => BitConverter.ToUInt16(Steps.First(static s => s.Request.Command == VfioUserCommand.Version).Reply!.Body, 2);

    /// <summary>Whether the recorded server took an operation on a feature of migration v2.</summary>
    private bool HasMigration => Steps.Any(static s => s.Request.Command == VfioUserCommand.DeviceFeature && s.Reply is { Header.IsError: false });

    /// <summary>Runs an action of the client and waits until the server has received and answered its message.</summary>
    internal void Play(CapturedStep step, Action client)
    {
        var done = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
        _steps.Add((step, done));
        client();
        if (!done.Task.Wait(TimeSpan.FromSeconds(10))) Assert.Fail($"message {step.Request.Number} ({step.Request.Command}): the client did not send it");
    }

    public void Dispose()
    {
        _steps.CompleteAdding();
        Server.Dispose();
        _steps.Dispose();
        _region.Dispose();
    }

    private void Run(ScriptedVfioUserServer server)
    {
        while (true)
        {
            VfioUserMessage m = server.Receive();
            if (!_steps.TryTake(out (CapturedStep Step, TaskCompletionSource Done) next))
            {
                Attach(server, m);
                continue;
            }
            try
            {
                Compare(next.Step, server, m);
                next.Done.SetResult();
            }
            catch (Exception e)
            {
                next.Done.SetException(e);
                throw;
            }
        }
    }

    private void Attach(ScriptedVfioUserServer server, VfioUserMessage m)
    {
        CapturedStep? recorded = Steps.FirstOrDefault(s => s.Reply is not null && s.Request.Command == m.Command && m.Command switch
        {
            VfioUserCommand.Version or VfioUserCommand.DeviceGetInfo => true,
            // Compare index and argsz only, because a client may pad its second request to the size of the reply.
            VfioUserCommand.DeviceGetRegionInfo or VfioUserCommand.DeviceGetIrqInfo => s.Request.Body.AsSpan(0, 4).SequenceEqual(m.Body.AsSpan(0, 4)) && s.Request.Body.AsSpan(8, 4).SequenceEqual(m.Body.AsSpan(8, 4)),
            VfioUserCommand.DeviceFeature => IsGetMigration(s),
            _ => false,
        });
        if (m.Command == VfioUserCommand.DeviceFeature) AnswerMigration(server, m, recorded);
        else if (recorded is not null) server.Reply(m, recorded.Reply!.Body, [.. Enumerable.Repeat(_region, recorded.Reply.Fds)]);
        else if (m.Command is VfioUserCommand.DeviceGetInfo or VfioUserCommand.DeviceGetRegionInfo or VfioUserCommand.DeviceGetIrqInfo) server.Answer(m);
        else Assert.Fail($"the client sent {m.Command} during attach");
    }

    /// <summary>Whether a recorded request is GET of the MIGRATION feature, which our client sends only during attach.</summary>
    internal static bool IsGetMigration(CapturedStep step) =>
        step.Request.Command == VfioUserCommand.DeviceFeature && step.Request.Body.AsSpan().SequenceEqual(VfioUserFeature.GetMigration);

    /// <summary>
    /// Answers how the device migrates, once for each operation. Most foreign clients never asked. libvfio-user's answer is the same for each device
    /// that has migration v2 (STOP_COPY and PRE_COPY, as recorded in probe-gpio-features), and EINVAL for all others.
    /// </summary>
    private void AnswerMigration(ScriptedVfioUserServer server, VfioUserMessage m, CapturedStep? recorded)
    {
        Assert.That(_migrationAsked, Has.Count.LessThan(MigrationExpected.Length), "the client asked for a feature once more during attach");
        VfioFeatureOp op = MigrationExpected[_migrationAsked.Count];
        byte[] expected = op == VfioFeatureOp.Get ? VfioUserFeature.GetMigration : ScriptedVfioUserServer.Bytes(VfioUserFeature.Length, static b =>
            new VfioUserFeature(VfioUserFeature.Length, VfioDeviceFeature.Migration, VfioFeatureOp.Probe).Write(b));
        Assert.That((m.Body, m.Header.Flags, m.Fds.Count), Is.EqualTo((expected, 0u, 0)), $"the client must ask {op} MIGRATION during attach");
        _migrationAsked.Add(op);
        if (recorded is not null) server.Reply(m, recorded.Reply!.Body);
        else if (HasMigration) server.Reply(m, [.. m.Body, .. BitConverter.GetBytes((ulong)(VfioMigrationFlags.StopCopy | VfioMigrationFlags.PreCopy))]);
        else server.Error(m, Errno.EINVAL);
    }

    private void Compare(CapturedStep step, ScriptedVfioUserServer server, VfioUserMessage m)
    {
        string what = $"message {step.Request.Number}";
        if (step.Request.Command == VfioUserCommand.RegionWriteMulti)
        {
            Unpack(step, server, m, what);
        }
        else
        {
            Assert.That((m.Command, m.Header.Flags, m.Fds.Count), Is.EqualTo((step.Request.Command, step.Request.Header.Flags, step.Request.Fds)), what);
            Assert.That(Normalise(m.Command, m.Body), Is.EqualTo(Normalise(m.Command, step.Request.Body)), what);
            if (step.Reply is { } reply) server.Raw(ScriptedVfioUserServer.Message(m.Header.Id, reply.Command, reply.Header.Flags, reply.Header.Errno, reply.Body));
        }
        foreach (CapturedMessage command in step.After.Where(static a => !a.FromClient))
        {
            Prepare(command, step);
            VfioUserMessage answer = server.Ask(command.Command, command.Body, id: command.Header.Id);
            CapturedMessage recorded = step.After.First(a => a.FromClient && a.Header.Id == command.Header.Id && a.Command == command.Command);
            Assert.That(ScriptedVfioUserServer.Message(answer.Header.Id, answer.Command, answer.Header.Flags, answer.Header.Errno, answer.Body), Is.EqualTo(recorded.Bytes), $"reply to message {command.Number}");
        }
    }

    /// <summary>QEMU packs queued posted writes into one message. Our client sends them one by one, and they must be the same in the same order.</summary>
    private static void Unpack(CapturedStep step, ScriptedVfioUserServer server, VfioUserMessage first, string what)
    {
        int count = (int)VfioUserWriteMulti.ReadCount(step.Request.Body);
        for (int i = 0; i < count; i++)
        {
            VfioUserMessage m = i == 0 ? first : server.Expect(VfioUserCommand.RegionWrite);
            VfioUserRegionAccess access = VfioUserWriteMulti.ReadEntry(step.Request.Body.AsSpan(8 + (24 * i), 24), out ReadOnlySpan<byte> data);
            Assert.That((m.Command, m.Access, m.Header.WantsNoReply), Is.EqualTo((VfioUserCommand.RegionWrite, access, true)), what);
            Assert.That(m.Body[16..], Is.EqualTo(data.ToArray()), what);
        }
    }

    /// <summary>
    /// Puts the data of a recorded DMA_READ into memory, as the foreign guest did. Data of an earlier DMA_WRITE is left alone, because that write
    /// itself must have put it there.
    /// </summary>
    private void Prepare(CapturedMessage command, CapturedStep step)
    {
        VfioUserDmaAccess.TryRead(command.Body, out VfioUserDmaAccess access);
        if (command.Command == VfioUserCommand.DmaWrite) _written.Add(access.Address);
        CapturedMessage recorded = step.After.First(a => a.FromClient && a.Header.Id == command.Header.Id && a.Command == command.Command);
        if (command.Command != VfioUserCommand.DmaRead || recorded.Header.IsError || _written.Contains(access.Address)) return;
        // All sections of the replay lie in one block, where the offset equals the address.
        recorded.Body.AsSpan(16).CopyTo(_dmaMemory.Blocks[0].Slice(access.Address, (int)access.Count));
    }

    /// <summary>
    /// Clears what the protocol leaves open to the client: the file offset of a map without descriptor, the optional block of LOGGING_STOP, the
    /// argsz of a report.
    /// </summary>
    private static byte[] Normalise(VfioUserCommand command, byte[] body)
    {
        byte[] copy = [.. body];
        if (command == VfioUserCommand.DmaMap) copy.AsSpan(8, 8).Clear();
        if (command != VfioUserCommand.DeviceFeature) return copy;
        if (copy[4] == (byte)VfioDeviceFeature.DmaLoggingStop) return copy[4..8];
        if (copy[4] == (byte)VfioDeviceFeature.DmaLoggingReport) copy.AsSpan(0, 4).Clear();
        return copy;
    }
}
