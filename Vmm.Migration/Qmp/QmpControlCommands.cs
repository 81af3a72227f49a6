using System.Text.Json.Nodes;
using Vmm.Core.Channels;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Qmp;

/// <summary>The commands that query and control the VM itself: status, stop, cont, reset, quit and the like (qmp 7).</summary>
internal sealed class QmpControlCommands(QmpServer server, Vm vm)
{
    private static readonly QmpEnum s_runState = new([.. RunStateNames.All]);
    private static readonly QmpEnum s_deviceState = new("present", "lost");

    internal IEnumerable<QmpCommand> Commands()
    {
        yield return new("query-status", QmpObject.Empty, new QmpObject(new("running", QmpType.Bool), new("status", s_runState), new("x-held", QmpType.Str, true)), _ => Status());
        yield return new("query-name", QmpObject.Empty, new QmpObject(new QmpMember("name", QmpType.Str, true)), QueryName);
        yield return new("query-uuid", QmpObject.Empty, new QmpObject(new QmpMember("UUID", QmpType.Str)), _ => new JsonObject { ["UUID"] = vm.Uuid.ToString() });
        yield return new(QmpServer.ExtensionPrefix + "query-devices", QmpObject.Empty,
            new QmpArray(new QmpObject(new("id", QmpType.Str), new("state", s_deviceState), new("reason", QmpType.Str, true))), _ => Devices());
        yield return new("stop", _ => { vm.Stop(); return null; });
        yield return new("cont", new(new QmpMember("x-force", QmpType.Bool, true)), QmpObject.Empty, call => { Cont(call.Bool("x-force", false)); return null; });
        yield return new("system_reset", _ => { server.ResetVm(); return null; });
        yield return new("quit", Quit);
        yield return new("pmemsave", new(new("val", QmpType.Int), new("size", QmpType.Int), new("filename", QmpType.Str)), QmpObject.Empty, PMemSave);
    }

    /// <summary>Which devices are there, and why one is not. Takes no lock, because somebody may hold the BQL and wait for a device.</summary>
    private JsonArray Devices() => new([.. vm.Devices.Select(static d =>
    {
        // Read once: the device may be lost at this moment.
        string? reason = d.LostReason;
        var one = new JsonObject { ["id"] = d.Id, ["state"] = reason is null ? "present" : "lost" };
        if (reason is not null) one["reason"] = reason;
        return one;
    })]);

    internal JsonObject Status()
    {
        RunState state = vm.RunState.State;
        var status = new JsonObject { ["running"] = RunStateTable.IsRunning(state), ["status"] = state.ToWireName() };
        if (vm.HeldBecause is { } reason) status["x-held"] = reason;
        return status;
    }

    private void Cont(bool force)
    {
        if (vm.RunState.State == RunState.PostMigrate) server.Log.ContinuedAfterMigration("two copies of the guest run if the destination runs too");
        vm.Cont(force);
    }

    private JsonObject QueryName(QmpCall call) => vm.Name is null ? [] : new JsonObject { ["name"] = vm.Name };

    private JsonNode? Quit(QmpCall call)
    {
        server.Shutdown("host-qmp-quit");
        // The client must have its answer before the host ends the process.
        call.AfterAnswer = () => server.RequestQuit(0, null);
        return null;
    }

    private JsonNode? PMemSave(QmpCall call)
    {
        long address = call.Int("val"), size = call.Int("size");
        string path = call.Str("filename");
        if (address < 0 || size < 0 || !IsRam((ulong)address, (ulong)size))
            throw new QmpErrorException($"Invalid addr 0x{address:x16}/size {size} specified");
        using IMigrationChannel file = OpenForWriting(path);
        // A FIFO whose reader sleeps must not hold up the end of the server.
        using CancellationTokenRegistration stop = call.Stopping.Register(() => file.Shutdown(ChannelShutdown.Both));
        try
        {
            byte[] buffer = new byte[(int)Math.Min(size, 1 << 20)];
            for (long done = 0; done < size;)
            {
                call.Stopping.ThrowIfCancellationRequested();
                Span<byte> part = buffer.AsSpan(0, (int)Math.Min(buffer.Length, size - done));
                vm.Memory.Read(new GuestAddress((ulong)(address + done)), part);
                file.Write(part);
                done += part.Length;
            }
            return null;
        }
        catch (ChannelException e)
        {
            throw new QmpErrorException($"An IO error has occurred writing '{path}': {Posix.Describe(e.Errno)}");
        }
    }

    private static IMigrationChannel OpenForWriting(string path)
    {
        try
        {
            return MigrationConnector.OpenAtOnce(new MigrationAddress { Transport = MigrationTransport.File, Path = path }, outgoing: true, null, null)!;
        }
        catch (ChannelException e)
        {
            throw new QmpErrorException($"Could not open '{path}': {Posix.Describe(e.Errno)}");
        }
    }

    private bool IsRam(ulong address, ulong size)
    {
        for (ulong end = address + size; address < end;)
        {
            if (vm.Memory.FindBlock(new GuestAddress(address)) is not { } block) return false;
            address = block.Range.End;
        }
        return true;
    }
}
