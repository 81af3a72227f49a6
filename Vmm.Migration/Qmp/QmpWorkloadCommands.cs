using System.Text.Json.Nodes;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Workloads;

namespace Vmm.Migration.Qmp;

/// <summary>The command that lets the VM's workloads verify what they wrote to RAM. An extension: QEMU has no workloads.</summary>
internal sealed class QmpWorkloadCommands(QmpServer server, Vm vm)
{
    internal IEnumerable<QmpCommand> Commands()
    {
        var report = new QmpObject(new("pages-checked", QmpType.Int), new("bad-pages", QmpType.Int), new("first-bad", QmpType.Str, true),
            new("writes", QmpType.Int), new("violations", QmpType.Int));
        yield return new(QmpServer.ExtensionPrefix + "workload-verify", QmpObject.Empty, report, Verify);
    }

    private JsonObject Verify(QmpCall call)
    {
        IWorkload[] workloads = [.. vm.Devices.OfType<IWorkload>()];
        if (workloads.Length == 0) throw new DeviceNotFoundException("this VM has no workload");
        WorkloadReport[] reports = [.. workloads.Select(w => w.Verify(server.Stopping))];
        var answer = new JsonObject
        {
            ["pages-checked"] = reports.Sum(static r => r.PagesChecked), ["bad-pages"] = reports.Sum(static r => r.BadPages),
            ["writes"] = workloads.Sum(static w => w.Writes), ["violations"] = workloads.Sum(static w => w.Violations),
        };
        WorkloadViolation? first = reports.Select(static r => r.FirstBad).FirstOrDefault(static v => v is not null)
            ?? workloads.Select(static w => w.FirstViolation).FirstOrDefault(static v => v is not null);
        if (first is not null) answer["first-bad"] = first.ToString();
        return answer;
    }
}
